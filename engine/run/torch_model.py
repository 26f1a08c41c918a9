"""The torch decoder over a paged pool: what runs where no native kernels are."""

from __future__ import annotations

from torch import Tensor

from engine.attention.metadata import Batch
from engine.attention.pool import PagedPool
from engine.attention.reference import ReferenceAttention
from engine.models.decoder import Decoder
from kvtransfer.layout import KVLayout


class TorchModel:
    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.config = decoder.config
        self.place = decoder.place
        self.num_parameters = decoder.num_parameters
        self._attention: ReferenceAttention | None = None

    def attach(self, layout: KVLayout, memory: memoryview) -> None:
        # Where the device cannot reach the given memory, the pool is the device's own.
        on_cpu = self.place.device.type == "cpu"
        pool = PagedPool.over(layout, memory) if on_cpu else PagedPool.allocated(layout, self.place.device)
        self._attention = ReferenceAttention(pool, self.config.windows)

    def detach(self) -> None:
        self._attention = None

    def __call__(self, batch: Batch) -> Tensor:
        assert self._attention is not None, "attach a pool before executing"
        return self.decoder(batch, self._attention.plan(batch))
