"""FlashInfer's decodes for CUDA graphs: so many rows, always from the same memory, planned anew each step."""

from __future__ import annotations

from typing import Any

import torch
from flashinfer import BatchDecodeWithPagedKVCacheWrapper
from torch import Tensor

from engine.attention.flashinfer import DECODE_BACKEND, LAYOUT, FlashInferAttention, FlashInferStep
from engine.attention.pages import Pages


class PageMemory:
    """Where graphs of all sizes read their pages. Only one of them runs at a time, so one memory does for all."""

    def __init__(self, most_rows: int, most_pages: int, device: torch.device) -> None:
        """`most_pages`: of all rows together."""
        self.starts = torch.zeros(most_rows + 1, dtype=torch.int32, device=device)
        self.ids = torch.zeros(most_pages, dtype=torch.int32, device=device)
        self.last_lengths = torch.zeros(most_rows, dtype=torch.int32, device=device)


class FixedDecodes:
    """Decodes of `rows` rows, of which the last may be nobody's."""

    def __init__(self, attention: FlashInferAttention, rows: int, memory: PageMemory, slots: Tensor) -> None:
        """`slots` [rows] int64: where each row's KV goes, in memory of the graph."""
        self.attention = attention
        self.rows = rows
        self.memory = memory
        self.wrappers = {window: self._wrapper() for window in set(attention.windows)}
        self.step = FlashInferStep(attention.layers, attention.windows, rows, self.wrappers, {}, slots)

    def _wrapper(self) -> Any:
        return BatchDecodeWithPagedKVCacheWrapper(
            self.attention.workspace,
            LAYOUT,
            use_cuda_graph=True,
            use_tensor_cores=self.attention.heads.on_tensor_cores,
            paged_kv_indptr_buffer=self.memory.starts[: self.rows + 1],
            paged_kv_indices_buffer=self.memory.ids,
            paged_kv_last_page_len_buffer=self.memory.last_lengths[: self.rows],
            backend=DECODE_BACKEND,
        )

    def plan(self, pages: Pages) -> None:
        """Inside a step of the staging; at most `rows` rows."""
        padded, staging, heads = pages.padded(self.rows), self.attention.staging, self.attention.heads
        starts, last_lengths = staging.put(padded.starts), staging.put(padded.last_lengths)
        # The wrappers copy page ids from the device alone without waiting; these are where they belong already.
        ids = staging.send(padded.ids, self.memory.ids)
        for window, wrapper in self.wrappers.items():
            wrapper.plan(starts, ids, last_lengths, *heads.sizes, **heads.options(window))
