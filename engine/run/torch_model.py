"""The torch decoder over a paged pool: what runs where no native kernels are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.attention.metadata import Batch
from engine.attention.pool import DTYPES, PagedPool
from engine.attention.reference import ReferenceAttention
from engine.attention.tensors import BatchTensors
from engine.core import Row, StepOutput
from engine.layers.placement import Placement
from engine.models.checkpoint import Checkpoint
from engine.models.load import decoder_of
from engine.models.place import Place
from engine.run.weight_formats import NONE
from engine.sampling.sampler import sample
from kvtransfer.layout import KVLayout


class TorchModel:
    draft_rows = 0  # libraries choose how to sum by the shape of a product

    def __init__(self, checkpoint: Checkpoint, place: Place) -> None:
        self.config = checkpoint.config
        self.place = place
        self.quantization = NONE  # what the checkpoint has quantized is expanded
        self.decoder = decoder_of(checkpoint, Placement(DTYPES[place.dtype], torch.device(place.device)))
        self._attention: ReferenceAttention | None = None

    def attach(self, layout: KVLayout, memory: memoryview) -> None:
        # Where the device cannot reach the given memory, the pool is the device's own.
        device = self.decoder.place.device
        pool = PagedPool.over(layout, memory) if device.type == "cpu" else PagedPool.allocated(layout, device)
        self._attention = ReferenceAttention(pool, self.config.windows)

    def detach(self) -> None:
        self._attention = None

    def __call__(self, batch: Batch) -> Tensor:
        """In the model's dtype, on its device."""
        assert self._attention is not None, "attach a pool before executing"
        return self.decoder(BatchTensors.of(batch, self.decoder.place.device), self._attention.plan(batch))

    def sample(self, logits: Tensor, rows: Sequence[Row]) -> StepOutput:
        return sample(logits, rows)
