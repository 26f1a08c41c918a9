"""A model on an NVIDIA card: FlashInfer's attention, Triton's kernels around it, CUDA graphs for decode steps.

A step of one token a row is a graph's replay; any other runs kernel by kernel. Either way the host builds its arrays in
pinned memory and goes on; it waits for the card once, for the sampled tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.attention.flashinfer import FlashInferAttention
from engine.attention.metadata import Batch
from engine.attention.pages import decodes_first
from engine.attention.pool import DTYPES, PagedPool
from engine.attention.staging import Staging
from engine.core import Row, StepOutput
from engine.layers.placement import Placement
from engine.models.checkpoint import Checkpoint
from engine.models.load import decoder_of
from engine.models.place import Place
from engine.run.cuda_decoder import CudaDecoder, Inputs
from engine.run.graphs import DecodeGraphs
from engine.run.weight_formats import NONE
from engine.sampling.cuda import CudaSampler
from kvtransfer.layout import KVLayout

STAGING_BYTES = 1 << 20  # at first


class CudaModel:
    draft_rows = 0  # libraries choose how to sum by the shape of a product

    def __init__(self, checkpoint: Checkpoint, place: Place, most_rows: int) -> None:
        """`most_rows`: of a step. Everything of this process that runs on a card runs on this one from now on."""
        self.config = checkpoint.config
        self.place = place
        self.quantization = NONE  # what the checkpoint has quantized is expanded
        self.device = torch.device("cuda", torch.device(place.device).index or 0)
        torch.cuda.set_device(self.device)  # Triton and FlashInfer launch on the current one
        self.most_rows = most_rows
        self.decoder = CudaDecoder(decoder_of(checkpoint, Placement(DTYPES[place.dtype], self.device)))
        self._staging = Staging(self.device, STAGING_BYTES)
        self._sampler = CudaSampler(most_rows)
        self._attention: FlashInferAttention | None = None
        self._graphs: DecodeGraphs | None = None

    def attach(self, layout: KVLayout, memory: memoryview) -> None:
        """The pool is the card's own. Captures the graphs, after building what they are of: FlashInfer compiles for
        minutes when it does so for the first time on a machine."""
        pool = PagedPool.allocated(layout, self.device)
        self._attention = FlashInferAttention(pool, self.config.num_heads, self.config.windows, self._staging)
        most_pages = min(-(-self.config.max_positions // layout.block_size), layout.num_blocks)
        with self._staging.step():
            self._graphs = DecodeGraphs(self.decoder, self._attention, self.most_rows, most_pages)

    def detach(self) -> None:
        self._attention = self._graphs = None

    def __call__(self, batch: Batch) -> Tensor:
        """In the model's dtype, on the card, which may still be at it."""
        decodes = len(batch.tokens) == len(batch.num_new) <= self.most_rows
        logits = self.replay(batch) if decodes else self.compute(batch)
        if not len(batch.sampled):
            torch.cuda.synchronize()  # nobody waits for its tokens, and what a step computed is there when it returns
        return logits

    def replay(self, batch: Batch) -> Tensor:
        """`__call__` by a graph: for at most `most_rows` rows of one token each."""
        assert self._graphs is not None, "attach a pool before executing"
        with self._staging.step():
            logits = self._graphs(batch)
            if len(batch.sampled) == len(logits):
                return logits
            return logits.index_select(0, self._staging.send(batch.sampled))

    def compute(self, batch: Batch) -> Tensor:
        """`__call__` kernel by kernel: for any batch."""
        assert self._attention is not None, "attach a pool before executing"
        ordered, send = decodes_first(batch), self._staging.send
        with self._staging.step():
            step = self._attention.plan(ordered)
            return self.decoder(Inputs(send(ordered.tokens), send(ordered.positions)), step, send(ordered.sampled))

    def sample(self, logits: Tensor, rows: Sequence[Row]) -> StepOutput:
        return self._sampler(logits, rows)
