"""The attention block of one layer: projections, norms and rotation around whatever does the attending."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.attention.backend import AttentionStep
from engine.layers.linear import Linear
from engine.layers.norm import RMSNorm
from engine.layers.placement import Placement
from engine.layers.rotary import Rotation
from engine.models.config import ModelConfig


class Attention:
    def __init__(self, config: ModelConfig, layer: int, place: Placement) -> None:
        self.layer = layer
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        rows, kv_rows = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        parts = {"q_proj": rows, "k_proj": kv_rows, "v_proj": kv_rows}
        self.qkv = Linear(config.hidden_size, parts, config.qkv_bias, place)
        self.output = Linear(rows, {"o_proj": config.hidden_size}, config.output_bias, place)
        self.norms = self._head_norms(config, place) if config.family.qk_norm else None

    def _head_norms(self, config: ModelConfig, place: Placement) -> tuple[RMSNorm, RMSNorm]:
        return RMSNorm(self.head_dim, config.rms_eps, place), RMSNorm(self.head_dim, config.rms_eps, place)

    def __call__(self, hidden: Tensor, rotation: Rotation, step: AttentionStep) -> Tensor:
        """[tokens, hidden] to [tokens, hidden]."""
        heads = self.qkv(hidden).view(len(hidden), -1, self.head_dim)  # [tokens, q + k + v heads, head_dim]
        turning = self.num_heads + self.num_kv_heads
        turned = rotation(self._normed(heads[:, :turning]))
        queries, keys = turned[:, : self.num_heads], turned[:, self.num_heads :]
        attended = step.attend(self.layer, queries, keys, heads[:, turning:])  # [tokens, q heads * head_dim]
        return self.output(attended)

    def _normed(self, heads: Tensor) -> Tensor:
        """Query and key heads, side by side: [tokens, q + k heads, head_dim]."""
        if self.norms is None:
            return heads
        queries, keys = self.norms[0](heads[:, : self.num_heads]), self.norms[1](heads[:, self.num_heads :])
        return torch.cat((queries, keys), dim=1)

    def targets(self, prefix: str) -> dict[str, Tensor]:
        named = {**self.qkv.targets(prefix), **self.output.targets(prefix)}
        if self.norms:
            named |= {**self.norms[0].targets(f"{prefix}q_norm"), **self.norms[1].targets(f"{prefix}k_norm")}
        return named
