"""Rotary position embedding (arXiv:2104.09864)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.models.config import Rope
from engine.models.rotary import inverse_frequencies


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
        frequencies = inverse_frequencies(rope, head_dim)  # [head_dim / 2] float32
        self.inverse_frequencies = torch.from_numpy(frequencies).to(device)
        self.attention_factor = rope.attention_factor

    def __call__(self, positions: Tensor, dtype: torch.dtype) -> Rotation:
        """`positions`: [tokens]. Angles are float32 always: at position 8,000 a bfloat16 has no fraction left."""
        angles = torch.outer(positions.float(), self.inverse_frequencies)  # [tokens, head_dim / 2]
        cos, sin = angles.cos() * self.attention_factor, angles.sin() * self.attention_factor
        return Rotation(
            torch.cat((cos, cos), dim=-1).to(dtype).unsqueeze(1),
            torch.cat((-sin, sin), dim=-1).to(dtype).unsqueeze(1),
        )
