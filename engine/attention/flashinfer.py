"""Paged attention by FlashInfer, over the strided block-major pool: decodes and ragged causal chunks, for CUDA.

A batch comes with its decodes first. They and the chunks are a call each, planned once a step for every distinct window
and used by all layers that have it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from flashinfer import BatchDecodeWithPagedKVCacheWrapper, BatchPrefillWithPagedKVCacheWrapper
from torch import Tensor

from engine.attention.metadata import Batch, Indices
from engine.attention.pages import Pages
from engine.attention.pool import PagedPool
from engine.attention.staging import Staging

WORKSPACE_BYTES = 128 << 20  # as FlashInfer recommends; parts of split rows are kept in it
LAYOUT = "HND"  # of a layer's keys, and of its values: [block, kv_head, token, dim]
DECODE_BACKEND = "fa2"
CUDA_CORE_SHARES = (1, 2, 3)  # query heads for each kv head with which decodes are faster without tensor cores

Window = int | None


@dataclass(frozen=True, slots=True)
class Heads:
    """What a plan says of the model and the pool."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: torch.dtype
    soft_cap: float  # scores become cap * tanh(score / cap); 0: none

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        return self.num_heads, self.num_kv_heads, self.head_dim, self.block_size

    def options(self, window: Window) -> dict[str, Any]:
        """FlashInfer counts the tokens before the one that looks back."""
        return {
            "window_left": -1 if window is None else window - 1,
            "logits_soft_cap": self.soft_cap,
            "q_data_type": self.dtype,
            "kv_data_type": self.dtype,
        }

    @property
    def on_tensor_cores(self) -> bool:
        return self.num_heads // self.num_kv_heads not in CUDA_CORE_SHARES


class FlashInferAttention:
    def __init__(
        self,
        pool: PagedPool,
        num_heads: int,
        windows: Sequence[Window],
        staging: Staging,
        soft_cap: float = 0.0,
    ) -> None:
        """`windows`: per layer, how many tokens back a token sees, itself included; None is all. The pool holds
        bfloat16 or float16."""
        layout = pool.layout
        self.layers = layers_of(pool)
        self.windows = tuple(windows)
        self.staging = staging
        self.heads = Heads(
            num_heads, layout.num_kv_heads, layout.head_dim, layout.block_size, pool.items.dtype, soft_cap
        )
        self.workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=pool.items.device)
        self._decodes = {window: self._decode_wrapper() for window in set(windows)}
        self._chunks = {window: self._chunk_wrapper() for window in set(windows)}

    def _decode_wrapper(self) -> Any:
        return BatchDecodeWithPagedKVCacheWrapper(
            self.workspace, LAYOUT, use_tensor_cores=self.heads.on_tensor_cores, backend=DECODE_BACKEND
        )

    def _chunk_wrapper(self) -> Any:
        return BatchPrefillWithPagedKVCacheWrapper(self.workspace, LAYOUT)

    def plan(self, batch: Batch) -> FlashInferStep:
        """Inside a step of the staging, which the last step's wrappers are planned anew for. The batch's rows of one
        token come first, see `pages.decodes_first`."""
        num_decodes = int((batch.num_new == 1).sum())
        if num_decodes:
            self._plan_decodes(self._pages(batch, slice(num_decodes)))
        if num_decodes < len(batch.num_new):
            chunks = slice(num_decodes, None)
            self._plan_chunks(batch.starts[num_decodes:] - num_decodes, self._pages(batch, chunks))
        slots = self.staging.send(batch.slots)
        return FlashInferStep(self.layers, self.windows, num_decodes, self._decodes, self._chunks, slots)

    def _pages(self, batch: Batch, rows: slice) -> Pages:
        return Pages.of(batch.context_lengths[rows], batch.block_tables[rows], self.heads.block_size)

    def _plan_decodes(self, pages: Pages) -> None:
        arrays = self._staged(pages)
        for window, wrapper in self._decodes.items():
            wrapper.plan(*arrays, *self.heads.sizes, **self.heads.options(window))

    def _plan_chunks(self, starts: Indices, pages: Pages) -> None:
        token_starts, arrays = self.staging.put(starts.astype(np.int32)), self._staged(pages)
        for window, wrapper in self._chunks.items():
            wrapper.plan(token_starts, *arrays, *self.heads.sizes, causal=True, **self.heads.options(window))

    def _staged(self, pages: Pages) -> tuple[Tensor, Tensor, Tensor]:
        """What the planner reads stays on the host, and what kernels alone read is on its way: once for all windows."""
        put = self.staging.put
        return put(pages.starts), self.staging.send(pages.ids), put(pages.last_lengths)


@dataclass(frozen=True, slots=True)
class FlashInferStep:
    """Planned wrappers, one of either kind for each distinct window."""

    layers: list[tuple[Tensor, Tensor]]
    windows: tuple[Window, ...]
    num_decodes: int
    decodes: Mapping[Window, Any]
    chunks: Mapping[Window, Any]
    slots: Tensor  # [tokens] int64: where each token's KV goes

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """See AttentionStep."""
        block_size = self.layers[layer][0].shape[2]
        blocks, offsets = self.slots // block_size, self.slots % block_size
        for cache, items in zip(self.layers[layer], (keys, values), strict=True):
            cache[blocks, :, offsets] = items
        return self.read(layer, queries)

    def read(self, layer: int, queries: Tensor) -> Tensor:
        """Attends with queries [tokens, heads, head_dim], whose own KV is in the pool already. Returns [tokens, heads *
        head_dim]."""
        output = torch.empty(queries.shape, dtype=queries.dtype, device=queries.device)
        cache, window, split = self.layers[layer], self.windows[layer], self.num_decodes
        if split:
            self.decodes[window].run(queries[:split], cache, out=output[:split])
        if split < len(queries):
            self.chunks[window].run(queries[split:], cache, out=output[split:])
        return output.flatten(1)


def layers_of(pool: PagedPool) -> list[tuple[Tensor, Tensor]]:
    """Each layer's keys and values, views [block, kv_head, token, dim] into the pool."""
    layout = pool.layout
    shape = (layout.num_blocks, layout.num_layers, 2, layout.num_kv_heads, layout.block_size, layout.head_dim)
    layers = pool.items.view(shape).unbind(1)
    return [(layer[:, 0], layer[:, 1]) for layer in layers]
