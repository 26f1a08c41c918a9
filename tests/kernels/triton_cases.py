"""Each Triton kernel beside its torch reference: the same checks for the interpreter on a CPU and for a card."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.testing import assert_close

from engine.sampling.draw import Choice
from engine.sampling.draw import draw as draw_in_torch
from kernels.triton import gate, norm, reference, rotary, sampling

# Rounded where the references round, in another order of summing: two units in the last place. Triton's interpreter
# cuts bfloat16 off where a card rounds, once for each step.
TOLERANCES = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
INTERPRETED = {**TOLERANCES, torch.bfloat16: 4e-2}

EPSILON = 1e-5
BLOCKS, BLOCK_SIZE, LAYERS = 12, 4, 3
GUARD = 77.0  # what the pool holds where nobody writes


class Numbers:
    """Seeded, of one dtype, on one device."""

    def __init__(self, seed: int, dtype: torch.dtype, device: str) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = dtype
        self.device = device
        self.tolerance = (TOLERANCES if device == "cuda" else INTERPRETED)[dtype]

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.device, dtype or self.dtype)

    def below(self, limit: int, *shape: int) -> Tensor:
        return torch.randint(limit, shape, generator=self.generator).to(self.device)

    def assert_close(self, found: Tensor, expected: Tensor) -> None:
        assert_close(found, expected, rtol=self.tolerance, atol=self.tolerance)


def check_norm(numbers: Numbers, rows: int, size: int) -> None:
    stream, addend, weight = numbers.normal(rows, size), numbers.normal(rows, size), numbers.normal(size)
    numbers.assert_close(norm.rms_norm(stream, weight, EPSILON), reference.rms_norm(stream, weight, EPSILON))
    twin = stream.clone()
    found = norm.add_rms_norm(stream, addend, weight, EPSILON)
    numbers.assert_close(found, reference.add_rms_norm(twin, addend, weight, EPSILON))
    numbers.assert_close(stream, twin)


def check_gate(numbers: Numbers, rows: int, inner: int) -> None:
    gate_up = numbers.normal(rows, 2 * inner) * 4
    numbers.assert_close(gate.silu_mul(gate_up), reference.silu_mul(gate_up))


def check_rotary(numbers: Numbers, tokens: int, heads: int, kv_heads: int, head_dim: int, normed: bool) -> None:
    """Also that nothing but the tokens' slots in one layer is written, and nothing for a token without a slot."""
    projected = numbers.normal(tokens, (heads + 2 * kv_heads) * head_dim)
    turns, positions = numbers.normal(100, head_dim, dtype=torch.float32), numbers.below(100, tokens)
    slots = torch.randperm(BLOCKS * BLOCK_SIZE, generator=numbers.generator)[:tokens].to(numbers.device)
    slots[::3] = -1
    pool = torch.full(
        (BLOCKS, LAYERS, 2, kv_heads, BLOCK_SIZE, head_dim), GUARD, dtype=numbers.dtype, device=numbers.device
    )
    norms = (numbers.normal(head_dim), numbers.normal(head_dim), EPSILON) if normed else None
    twin = pool.clone()
    found = rotary.rotate_and_store(
        projected, turns, positions, slots, pool[:, 1, 0], pool[:, 1, 1], rotary.HeadNorms(*norms) if norms else None
    )
    expected = reference.rotate_and_store(projected, turns, positions, slots, twin[:, 1, 0], twin[:, 1, 1], norms)
    numbers.assert_close(found, expected)
    numbers.assert_close(pool, twin)
    assert torch.equal(pool == GUARD, twin == GUARD)


def check_draw(seed: int, rows: int, vocab_size: int, device: str) -> None:
    """Ties included: every second seed has few distinct logits."""
    random = np.random.default_rng(seed)
    logits = (random.standard_normal((rows, vocab_size)) * random.choice([1, 5])).astype(np.float32)
    if seed % 2:
        logits = np.round(logits * 2) / 2
    wishes = torch.tensor([_wish(random) for _ in range(rows)], dtype=torch.float64, device=device)
    scores = torch.from_numpy(logits).to(device)
    found = sampling.draw(scores, wishes)
    assert found.tolist() == reference.draw(scores, wishes).tolist()
    assert found.tolist() == draw_in_torch(scores, _choice(wishes)).tolist()


def _wish(random: np.random.Generator) -> tuple[float, ...]:
    return (
        random.choice([0.5, 1.0, 1.7]),
        random.choice([0.0, 0.0, 0.1]),
        random.choice([0, 1, 3, 50, 3000]),
        random.choice([1.0, 0.9, 0.3, 1e-6]),
        random.random(),
    )


def _choice(wishes: Tensor) -> Choice:
    temperature, min_p, top_k, top_p, uniform = wishes.unbind(1)
    return Choice(temperature.float(), min_p.float(), top_k.long(), top_p, uniform)
