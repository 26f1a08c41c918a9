"""A matrix product, one or several checkpoint matrices wide."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from engine.layers.placement import Placement


class Linear:
    """y = x Wᵀ + b. Matrices that read the same input are fused, stacked by output rows: one product instead of three.

    A tensor-parallel shard is the same object with fewer rows (or columns) and its own targets.
    """

    def __init__(self, in_features: int, parts: Mapping[str, int], bias: bool, place: Placement) -> None:
        """`parts`: each fused matrix's name in the checkpoint and its number of output features, in output order."""
        out_features = sum(parts.values())
        self.parts = dict(parts)
        self.weight = place.empty(out_features, in_features)
        self.bias = place.empty(out_features) if bias else None

    def __call__(self, inputs: Tensor) -> Tensor:
        """[tokens, in_features] to [tokens, out_features]."""
        return functional.linear(inputs, self.weight, self.bias)

    def targets(self, prefix: str) -> dict[str, Tensor]:
        sizes = list(self.parts.values())
        named = {
            f"{prefix}{name}.weight": part
            for name, part in zip(self.parts, torch.split(self.weight, sizes), strict=True)
        }
        if self.bias is not None:
            biases = zip(self.parts, torch.split(self.bias, sizes), strict=True)
            named.update({f"{prefix}{name}.bias": part for name, part in biases})
        return named
