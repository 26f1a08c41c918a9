"""The KV pool as torch sees it: one flat block-major allocation, with a view of rows and one of planes for each layer.

    pool    [block][layer][k|v][kv_head][token][dim]
    a plane is the last two of these, all tokens of one block in one head; a row is the last, one token in one head

A layer's view starts at the layer's first plane, so an index array for layer 0 is right for every layer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvtransfer.layout import KVLayout

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class PagedPool:
    def __init__(self, layout: KVLayout, items: Tensor) -> None:
        """`items`: [pool_bytes / item_bytes], of the layout's dtype."""
        self.layout = layout
        self.items = items
        rows = items.view(-1, layout.head_dim)
        planes = items.view(-1, layout.block_size * layout.head_dim)
        step = 2 * layout.num_kv_heads
        self.rows = [rows[layer * step * layout.block_size :] for layer in range(layout.num_layers)]
        self.planes = [planes[layer * step :] for layer in range(layout.num_layers)]

    @classmethod
    def over(cls, layout: KVLayout, memory: memoryview) -> PagedPool:
        """A pool in writable memory that others see too. Keeps the buffer exported for as long as the pool lives."""
        count = layout.pool_bytes // layout.item_bytes
        return cls(layout, torch.frombuffer(memory, dtype=DTYPES[layout.dtype], count=count))

    @classmethod
    def allocated(cls, layout: KVLayout, device: torch.device) -> PagedPool:
        """A pool of torch's own, zeroed."""
        count = layout.pool_bytes // layout.item_bytes
        return cls(layout, torch.zeros(count, dtype=DTYPES[layout.dtype], device=device))
