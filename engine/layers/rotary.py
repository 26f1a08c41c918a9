"""Rotary position embedding (arXiv:2104.09864), with the ways of stretching it to longer contexts."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, floor, log, pi

import torch
from torch import Tensor

from engine.models.config import Rope


@dataclass(frozen=True, slots=True)
class Rotation:
    """The turn of every token of one step; built once, used by every layer."""

    cos: Tensor  # [tokens, 1, head_dim]
    sin: Tensor  # [tokens, 1, head_dim], the first half negated

    def __call__(self, heads: Tensor) -> Tensor:
        """[tokens, heads, head_dim], turned. Pairs are (i, i + head_dim / 2), Hugging Face's order."""
        swapped = heads.roll(heads.shape[-1] // 2, dims=-1)
        return torch.addcmul(heads * self.cos, swapped, self.sin)


class RotaryEmbedding:
    def __init__(self, rope: Rope, head_dim: int, device: torch.device) -> None:
        self.inverse_frequencies = inverse_frequencies(rope, head_dim).to(device)  # [head_dim / 2] float32
        self.attention_factor = rope.attention_factor

    def __call__(self, positions: Tensor, dtype: torch.dtype) -> Rotation:
        """`positions`: [tokens]. Angles are float32 always: at position 8,000 a bfloat16 has no fraction left."""
        angles = torch.outer(positions.float(), self.inverse_frequencies)  # [tokens, head_dim / 2]
        cos, sin = angles.cos() * self.attention_factor, angles.sin() * self.attention_factor
        return Rotation(
            torch.cat((cos, cos), dim=-1).to(dtype).unsqueeze(1),
            torch.cat((-sin, sin), dim=-1).to(dtype).unsqueeze(1),
        )


def inverse_frequencies(rope: Rope, head_dim: int) -> Tensor:
    """Radians per token of each rotary pair: [head_dim / 2] float32."""
    plain = 1.0 / rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    match rope.kind:
        case "default":
            return plain / torch.tensor(rope.divisors) if rope.divisors else plain
        case "linear":
            return plain / rope.factor
        case "llama3":
            return _llama3(rope, plain)
        case "yarn":
            return _yarn(rope, plain, head_dim)


def _llama3(rope: Rope, plain: Tensor) -> Tensor:
    """Long wavelengths are stretched, short ones kept, those between blended by their turns in the first context."""
    turns = rope.original_max_positions * plain / (2 * pi)
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    return torch.lerp(plain / rope.factor, plain, blend.clamp(0, 1))


def _yarn(rope: Rope, plain: Tensor, head_dim: int) -> Tensor:
    """YaRN's NTK-by-parts: a linear ramp over the pairs between two numbers of turns (arXiv:2309.00071, 3.2)."""

    def pair_with(turns: float) -> float:
        return head_dim * log(rope.original_max_positions / (turns * 2 * pi)) / (2 * log(rope.theta))

    low, high = pair_with(rope.beta_fast), pair_with(rope.beta_slow)
    if rope.truncate:
        low, high = floor(low), ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low or 0.001  # a ramp of no width would divide by zero
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    return torch.lerp(plain, plain / rope.factor, ramp)
