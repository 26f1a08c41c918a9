"""Random ragged batches over a pool that holds their past, made twice: as the card has it, and for a reference."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.attention.metadata import Batch, batch_of
from engine.attention.pages import decodes_first
from engine.attention.pool import PagedPool
from engine.core import Request, SamplingParams, Sequence, Step
from kvtransfer.layout import KVLayout

NUM_LAYERS = 2


@dataclass(frozen=True)
class Shape:
    dtype: str
    kv_heads: int
    share: int  # query heads for each kv head
    head_dim: int
    block_size: int = 16

    @property
    def num_heads(self) -> int:
        return self.kv_heads * self.share

    def layout(self, num_blocks: int, dtype: str) -> KVLayout:
        return KVLayout(
            num_blocks=num_blocks,
            block_size=self.block_size,
            num_layers=NUM_LAYERS,
            num_kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            dtype=dtype,
        )


class Ragged:
    """Rows of `computed` tokens in the pool and `new` ones to come."""

    def __init__(self, shape: Shape, computed: list[int], new: list[int], seed: int) -> None:
        self.shape = shape
        lengths = np.add(computed, new)
        counts = -(-lengths // shape.block_size)
        num_blocks = int(counts.sum()) + 3
        free = np.random.default_rng(seed).permutation(num_blocks).tolist()
        rows = [self._row(free, *row) for row in zip(computed, lengths.tolist(), counts.tolist(), strict=True)]
        self.batch: Batch = decodes_first(batch_of(Step(rows, new), shape.block_size))
        generator = torch.Generator("cuda").manual_seed(seed)
        self.pool = PagedPool.allocated(shape.layout(num_blocks, shape.dtype), torch.device("cuda"))
        # What no row has written is large: whoever reads it shows.
        self.pool.items.normal_(generator=generator)
        self._spoil_unwritten(rows)
        self.wide_pool = PagedPool(shape.layout(num_blocks, "float32"), self.pool.items.float())
        heads = shape.num_heads + 2 * shape.kv_heads
        every = torch.randn(sum(new), heads, shape.head_dim, generator=generator, device="cuda")
        sizes = [shape.num_heads, shape.kv_heads, shape.kv_heads]
        self.queries, self.keys, self.values = (part.contiguous() for part in self._rounded(every).split(sizes, dim=1))

    def _row(self, free: list[int], computed: int, length: int, count: int) -> Sequence:
        request = Request(id="test", prompt=[0] * length, sampling=SamplingParams(max_tokens=1, seed=0))
        row = Sequence.of(request, arrival=0.0)
        row.num_computed = computed
        row.block_table = [free.pop() for _ in range(count)]
        return row

    def _spoil_unwritten(self, rows: list[Sequence]) -> None:
        layout = self.pool.layout
        shape = (layout.num_blocks, NUM_LAYERS, 2, layout.num_kv_heads, layout.block_size, layout.head_dim)
        items = self.pool.items.view(shape)
        written = torch.zeros(layout.num_blocks, layout.block_size, dtype=torch.bool)
        for row in rows:
            positions = np.arange(row.num_computed)
            blocks = np.array(row.block_table)[positions // layout.block_size]
            written[blocks, positions % layout.block_size] = True
        items.masked_fill_(~written[:, None, None, None, :, None].cuda(), 300.0)

    def _rounded(self, items: Tensor) -> Tensor:
        return items.to(self.pool.items.dtype)
