"""What a torch decoder reads of a batch, moved to its device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.attention.metadata import Batch


@dataclass(frozen=True, slots=True)
class BatchTensors:
    tokens: Tensor  # [tokens] int64
    positions: Tensor  # [tokens] int64
    sampled: Tensor  # [sampled rows] int64

    @classmethod
    def of(cls, batch: Batch, device: torch.device) -> BatchTensors:
        arrays = (batch.tokens, batch.positions, batch.sampled)
        return cls(*(torch.from_numpy(array).to(device) for array in arrays))
