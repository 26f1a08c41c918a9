"""CUDA graphs of decode steps: a captured forward for each of a ladder of batch sizes, run with rows to spare.

A batch takes the least graph that holds it. The rows to spare have no slot, so they write nowhere, and read one token
of block 0; their logits are cut off.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.attention.flashinfer import FlashInferAttention
from engine.attention.flashinfer_graph import FixedDecodes, PageMemory
from engine.attention.metadata import Batch, Indices
from engine.attention.pages import Pages
from engine.run.cuda_decoder import CudaDecoder, Inputs

NO_SLOT = -1


def ladder(most_rows: int) -> list[int]:
    """Powers of two, and the last rung: 1, 2, 4, 8, …, most_rows."""
    powers = [1 << exponent for exponent in range((most_rows - 1).bit_length())]
    return [*powers, most_rows]


class DecodeGraphs:
    """Only for batches of one token a row; the caller sees to it."""

    def __init__(self, decoder: CudaDecoder, attention: FlashInferAttention, most_rows: int, most_pages: int) -> None:
        """Captures all sizes, the largest first: the others then find room in its memory. `most_pages`: of a row."""
        device = attention.workspace.device
        self.attention = attention
        self.most_rows = most_rows
        memory = PageMemory(most_rows, most_rows * most_pages, device)
        inputs = torch.zeros(3 * most_rows, dtype=torch.int64, device=device)
        pool = torch.cuda.graph_pool_handle()
        self._graphs = {
            size: DecodeGraph(decoder, attention, size, memory, inputs, pool) for size in reversed(ladder(most_rows))
        }

    def __call__(self, batch: Batch) -> Tensor:
        """Inside a step of the staging. Logits of all rows [rows, vocab], valid until the next call."""
        rows = len(batch.tokens)
        pages = Pages.of(batch.context_lengths, batch.block_tables, self.attention.heads.block_size)
        graph = self._graphs[min(size for size in self._graphs if size >= rows)]
        return graph.replay(pages, batch)[:rows]


class DecodeGraph:
    """The forward of `rows` rows, captured."""

    def __init__(
        self,
        decoder: CudaDecoder,
        attention: FlashInferAttention,
        rows: int,
        memory: PageMemory,
        inputs: Tensor,  # [at least 3 * rows] int64: tokens, positions, slots, each of `rows`
        pool: Any,  # torch's handle of the memory that all graphs share
    ) -> None:
        self.rows = rows
        self.staging = attention.staging
        self._inputs = inputs[: 3 * rows]
        tokens, positions, slots = self._inputs.view(3, rows)
        self._decodes = FixedDecodes(attention, rows, memory, slots)
        self._prepare(Pages.none(), np.zeros((3, 0), np.int64))
        decoder(Inputs(tokens, positions), self._decodes.step, None)  # compiles, and allocates what outlives a capture
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool):
            self._logits = decoder(Inputs(tokens, positions), self._decodes.step, None)

    def replay(self, pages: Pages, batch: Batch) -> Tensor:
        """[rows, vocab]"""
        self._prepare(pages, np.stack((batch.tokens, batch.positions, batch.slots)))
        self._graph.replay()
        return self._logits

    def _prepare(self, pages: Pages, columns: Indices) -> None:
        """Sends what the graph reads; `columns` [3, at most rows]: tokens, positions, slots."""
        padded = np.zeros((3, self.rows), np.int64)
        padded[2] = NO_SLOT
        padded[:, : columns.shape[1]] = columns
        self.staging.send(padded.ravel(), self._inputs)
        self._decodes.plan(pages)
