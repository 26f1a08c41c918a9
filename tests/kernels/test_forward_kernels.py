"""Each kernel of the forward is its reference, for shapes of every kind, on every instruction set of this machine."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from kernels import cpu, reference_attention, reference_rows, reference_weight
from kernels.kinds import Floats, Indices, Kind, narrowed, widened
from tests import lesser_isa

if not cpu.NATIVE:
    pytest.skip(cpu.REASON, allow_module_level=True)

from kernels import attention, rows, threads, weight

KINDS: list[Kind] = ["float32", "bfloat16", "float16"]
ATTENTION_TOLERANCE = {"float32": 2e-5, "float16": 2e-5, "bfloat16": 5e-2}  # tiles round queries and weights to 8 bits
examples = settings(max_examples=lesser_isa.examples(40), deadline=None)
kinds = st.sampled_from(KINDS)
sizes = st.one_of(st.integers(1, 70), st.sampled_from([96, 128, 160, 576]))


@pytest.fixture(autouse=True, scope="module")
def two_threads() -> None:
    threads.set_threads(2)


def numbers(seed: int, *shape: int) -> Floats:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


@examples
@given(st.integers(1, 80), sizes, sizes, kinds, st.booleans(), st.integers(0, 99))
def test_products(num_rows: int, inputs: int, outputs: int, kind: Kind, gated: bool, seed: int) -> None:
    outputs *= 1 + gated
    matrix = narrowed(numbers(seed, outputs, inputs) / np.sqrt(inputs, dtype=np.float32), kind)
    items = numbers(seed + 1, num_rows, inputs)
    found = weight.multiply(items, weight.pack_weight(matrix, kind, gated))
    # What gated weights of bfloat16 give is rounded to it: half a unit in the eighth bit.
    rtol = 2**-8 if gated and kind == "bfloat16" else 1e-5
    assert_allclose(found, reference_weight.multiply(items, matrix, kind, gated), rtol=rtol, atol=2e-5)


@examples
@given(st.integers(1, 80), sizes, kinds, st.integers(0, 99))
def test_rows_multiplied_together_are_those_multiplied_alone(count: int, size: int, kind: Kind, seed: int) -> None:
    packed = weight.pack_weight(narrowed(numbers(seed, 48, size), kind), kind)
    items = numbers(seed + 1, count, size)
    together, alone = weight.multiply(items, packed), weight.multiply(items[-1:], packed)
    assert np.array_equal(together[-1:], alone)


@examples
@given(sizes, sizes, kinds, st.integers(0, 99))
def test_embedding_is_the_matrix_that_was_packed(outputs: int, inputs: int, kind: Kind, seed: int) -> None:
    matrix = narrowed(numbers(seed, outputs, inputs), kind)
    ids = np.random.default_rng(seed).integers(0, outputs, 7)
    assert np.array_equal(weight.embed(ids, weight.pack_weight(matrix, kind)), widened(matrix, kind)[ids])


@examples
@given(st.integers(1, 9), sizes, st.floats(1e-6, 1e-3), st.integers(0, 99))
def test_norm(count: int, size: int, epsilon: float, seed: int) -> None:
    items, scale = numbers(seed, count, size), numbers(seed + 1, size)
    assert_allclose(
        rows.rms_norm(items, scale, epsilon), reference_rows.rms_norm(items, scale, epsilon), rtol=1e-5, atol=1e-6
    )


@examples
@given(st.integers(1, 9), st.integers(1, 5), st.integers(1, 70), st.integers(0, 99))
def test_rotation(tokens: int, heads: int, half: int, seed: int) -> None:
    items, angles = numbers(seed, tokens, heads, 2 * half), numbers(seed + 1, tokens, half)
    turns = np.cos(angles), np.sin(angles)
    assert_allclose(rows.rotate(items, *turns), reference_rows.rotate(items, *turns), rtol=1e-5, atol=1e-6)


@examples
@given(sizes, st.sampled_from([1.0, 30.0, 1000.0]), st.integers(0, 99))
def test_gate(size: int, spread: float, seed: int) -> None:
    gates, values = numbers(seed, size) * np.float32(spread), numbers(seed + 1, size)
    assert_allclose(rows.silu_mul(gates, values), reference_rows.silu_mul(gates, values), rtol=1e-5, atol=1e-6)


@examples
@given(st.integers(1, 5000), st.integers(0, 99), st.integers(2, 50))
def test_the_largest_is_the_first_of_equals(size: int, seed: int, different: int) -> None:
    items = np.random.default_rng(seed).integers(-different, different, size).astype(np.float32)
    assert rows.argmax(items) == reference_rows.argmax(items)


class Scene:
    """Rows at any point of their sequences, over a pool of NaN wherever nothing was ever written."""

    def __init__(self, data: st.DataObject) -> None:
        draw = data.draw
        self.kind = draw(kinds)
        self.head_dim = draw(st.sampled_from([2, 8, 20, 32, 64, 96, 128]))
        self.num_kv_heads, self.share = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 3, 7]))
        self.block_size = draw(st.sampled_from([1, 4, 16, 32, 128]))
        news = draw(st.lists(st.one_of(st.just(1), st.integers(1, 90)), min_size=1, max_size=4))
        befores = [draw(st.one_of(st.just(0), st.integers(0, 300), st.just(1400))) for _ in news]
        self.random = np.random.default_rng(draw(st.integers(0, 99)))
        self.options: dict[str, Any] = {
            "window": draw(st.sampled_from([0, 0, 1, 9, 64, 100])),
            "soft_cap": draw(st.sampled_from([0.0, 0.0, 5.0])),
            "scale": draw(st.sampled_from([None, 0.3])),
        }
        self.starts = np.concatenate(([0], np.cumsum(news)))
        self.lengths: Indices = np.array(befores) + news
        self.tables = self._tables()
        self.pool = self._pool(befores)

    def _tables(self) -> Indices:
        needed = -(-self.lengths // self.block_size)
        ids = self.random.permutation(needed.sum() + 3)
        tables = np.zeros((len(needed), needed.max()), np.int64)
        for row, count in enumerate(needed):
            tables[row, :count], ids = ids[:count], ids[count:]
        return tables

    def _pool(self, befores: list[int]) -> Any:
        num_blocks = -(-self.lengths // self.block_size).sum() + 3
        shape = (num_blocks, 2, 2, self.num_kv_heads, self.block_size, self.head_dim)
        pool = np.full(
            shape, 0xFFFF if self.kind == "bfloat16" else np.nan, narrowed(np.zeros(1, np.float32), self.kind).dtype
        )
        for row, before in enumerate(befores):
            seen = np.arange(before)
            cached = self.normal(before, 2, self.num_kv_heads, self.head_dim)
            pool[self.tables[row][seen // self.block_size], 1, :, :, seen % self.block_size] = narrowed(
                cached, self.kind
            )
        return pool

    def normal(self, *shape: int) -> Floats:
        return self.random.standard_normal(shape, np.float32)


@settings(max_examples=lesser_isa.examples(80), deadline=None)
@given(data=st.data())
def test_paged_attention(data: st.DataObject) -> None:
    scene = Scene(data)
    tokens = int(scene.starts[-1])
    queries = scene.normal(tokens, scene.num_kv_heads * scene.share, scene.head_dim)
    keys, values = (scene.normal(tokens, scene.num_kv_heads, scene.head_dim) for _ in range(2))
    batch = queries, keys, values, scene.starts, scene.lengths, scene.tables
    theirs, ours = scene.pool.copy(), scene.pool
    expected = reference_attention.attend(*batch, theirs, scene.kind, 1, **scene.options)
    found = attention.attend(*batch, ours, scene.kind, 1, **scene.options)
    tolerance = ATTENTION_TOLERANCE[scene.kind]
    assert_allclose(found, expected, rtol=tolerance, atol=tolerance)
    assert np.abs(found - expected).mean() < tolerance / 10, "rounding, and not all one way"
    assert np.array_equal(ours.view(np.uint8), theirs.view(np.uint8)), "the same was stored, and nothing else"


@pytest.mark.skipif(not cpu.REASON.endswith("amx"), reason="holds of tiles: lanes sum in another order for few rows")
@settings(max_examples=lesser_isa.examples(40), deadline=None)
@given(data=st.data())
def test_a_token_attends_alone_as_it_does_among_others(data: st.DataObject) -> None:
    share, head_dim = data.draw(st.integers(1, 9)), data.draw(st.sampled_from([32, 64, 128]))
    block_size, window = data.draw(st.sampled_from([4, 16, 32])), data.draw(st.sampled_from([0, 40]))
    tokens = data.draw(st.integers(1, 300))
    random = np.random.default_rng(data.draw(st.integers(0, 99)))
    queries, keys, values = (random.standard_normal((tokens, n, head_dim), np.float32) for n in (2 * share, 2, 2))
    tables = np.arange(-(-tokens // block_size))[None]
    pool = np.zeros((tables.size, 1, 2, 2, block_size, head_dim), np.uint16)
    together = attention.attend(
        queries, keys, values, np.array([0, tokens]), np.array([tokens]), tables, pool, "bfloat16", 0, window=window
    )
    last = queries[-1:], keys[-1:], values[-1:], np.array([0, 1]), np.array([tokens]), tables
    assert np.array_equal(attention.attend(*last, pool, "bfloat16", 0, window=window)[0], together[-1])


@pytest.mark.parametrize("isa", lesser_isa.LESSER)
def test_every_lesser_instruction_set_of_this_machine(isa: str) -> None:
    lesser_isa.check(__file__, isa, "not lesser")
