"""Root-mean-square normalisation."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from engine.layers.placement import Placement


class RMSNorm:
    """x / rms(x) * weight over the last dimension, computed in float32 whatever the dtype (arXiv:1910.07467)."""

    def __init__(self, size: int, eps: float, place: Placement) -> None:
        self.weight = place.empty(size)
        self.eps = eps

    def __call__(self, inputs: Tensor) -> Tensor:
        return functional.rms_norm(inputs, self.weight.shape, self.weight, self.eps)

    def targets(self, name: str) -> dict[str, Tensor]:
        return {f"{name}.weight": self.weight}
