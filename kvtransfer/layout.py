"""Where a token's keys and values lie in a pool, and which bytes to copy between two pools.

A pool is block-major, `[block][layer][k|v][kv_head][token][dim]`: one block is one contiguous run over all layers, so
equal layouts move in few large copies; a range of heads stays contiguous within each K or V plane.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

Copies = NDArray[np.int64]  # [n, 3]: source offset, destination offset, length; all in bytes


class KVLayout(msgspec.Struct, frozen=True, kw_only=True):
    """The shape of one rank's pool. Heads [first_head, first_head + num_kv_heads) of the model's `total_kv_heads`."""

    num_blocks: int
    block_size: int  # tokens
    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    first_head: int = 0
    total_kv_heads: int = 0  # 0: num_kv_heads, no tensor parallelism

    @property
    def item_bytes(self) -> int:
        return ITEM_BYTES[self.dtype]

    @property
    def plane_bytes(self) -> int:
        """One K or V of one layer of one block: [kv_head][token][dim]."""
        return self.num_kv_heads * self.block_size * self.head_dim * self.item_bytes

    @property
    def block_bytes(self) -> int:
        return self.num_layers * 2 * self.plane_bytes

    @property
    def pool_bytes(self) -> int:
        return self.num_blocks * self.block_bytes


def plan(
    source: KVLayout,
    destination: KVLayout,
    source_blocks: Sequence[int],
    destination_blocks: Sequence[int],
    first_token: int,
    num_tokens: int,
) -> Copies:
    """The fewest copies that bring tokens [first_token, first_token + num_tokens) of a sequence from one pool to another.

    `source_blocks` and `destination_blocks` are the whole block tables, from the sequence's token 0. Raises ValueError
    when the layouts cannot describe the same model, or a table is too short or names a block outside its pool.
    """
    raise NotImplementedError
