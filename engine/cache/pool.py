"""Which blocks of the KV pool are free. Plain integers: the bytes are the executor's and the transports' business."""

from __future__ import annotations

import heapq
from collections.abc import Iterable


class BlockPool:
    """Hands out block ids, lowest first, so that a sequence's blocks tend to be neighbours and copy as one run."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks))  # a heap
        self._used = [False] * num_blocks

    @property
    def num_free(self) -> int:
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def allocate(self, count: int) -> list[int]:
        """`count` blocks, the caller's until freed. The caller has checked `num_free`."""
        assert count <= len(self._free), f"{count} blocks wanted, {len(self._free)} free"
        blocks = [heapq.heappop(self._free) for _ in range(count)]
        for block in blocks:
            self._used[block] = True
        return blocks

    def free(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            assert self._used[block], f"block {block} freed twice"
            self._used[block] = False
            heapq.heappush(self._free, block)
