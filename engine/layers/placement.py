"""In which dtype and on which device a layer keeps its weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Placement:
    dtype: torch.dtype
    device: torch.device

    def empty(self, *shape: int) -> Tensor:
        """Unset weights, to be filled from a checkpoint."""
        return torch.empty(shape, dtype=self.dtype, device=self.device)
