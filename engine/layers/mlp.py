"""The gated feed-forward block."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from engine.layers.linear import Linear
from engine.layers.placement import Placement
from engine.models.config import ModelConfig


class GatedMLP:
    """down(silu(gate(x)) * up(x)), gate and up fused (SwiGLU, arXiv:2002.05202)."""

    def __init__(self, config: ModelConfig, place: Placement) -> None:
        inner = config.intermediate_size
        self.gate_up = Linear(config.hidden_size, {"gate_proj": inner, "up_proj": inner}, config.mlp_bias, place)
        self.down = Linear(inner, {"down_proj": config.hidden_size}, config.mlp_bias, place)

    def __call__(self, hidden: Tensor) -> Tensor:
        """[tokens, hidden] to [tokens, hidden]."""
        gate, up = self.gate_up(hidden).chunk(2, dim=-1)  # each [tokens, intermediate]
        return self.down(functional.silu(gate).mul_(up))

    def targets(self, prefix: str) -> dict[str, Tensor]:
        return {**self.gate_up.targets(prefix), **self.down.targets(prefix)}
