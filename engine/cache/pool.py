"""Which blocks of the KV pool are free, shared, or worth keeping. Plain integers: the bytes are others' business.

blank ──allocate──▶ held (by one or more sequences) ──last release──▶ labelled? ──yes──▶ kept, oldest evicted first
  ▲                        ▲                                            │ no               │
  └────────────────────────│────────────────────────────────────────────┘                  │
  └────────────────────────┴───share──────────────────────── allocate (evicts) ────────────┘
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterable, Sequence


class BlockPool:
    """Hands out block ids, the lowest blank first, so that a sequence's blocks tend to be neighbours and copy as one
    run. A block may carry a label (what its content is); a labelled block is kept after its last holder let go, until
    the room is needed."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._blank = list(range(num_blocks))  # a heap
        self._kept: OrderedDict[int, None] = OrderedDict()  # labelled and held by nobody, oldest first
        self._holders = [0] * num_blocks
        self._labels: dict[int, bytes] = {}
        self._labelled: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can give: blank and kept ones."""
        return len(self._blank) + len(self._kept)

    @property
    def num_kept(self) -> int:
        return len(self._kept)

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def allocate(self, count: int) -> list[int]:
        """`count` blocks of unknown content, the caller's until freed. The caller has checked `num_free`."""
        assert count <= self.num_free, f"{count} blocks wanted, {self.num_free} free"
        return [self._take() for _ in range(count)]

    def find(self, label: bytes) -> int | None:
        """The block of this content, held or kept."""
        return self._labelled.get(label)

    def is_kept(self, block: int) -> bool:
        return block in self._kept

    def share(self, blocks: Iterable[int]) -> None:
        """One more holder for blocks that `find` returned."""
        for block in blocks:
            self._kept.pop(block, None)
            self._holders[block] += 1

    def label(self, block: int, label: bytes) -> None:
        """Says what a held block contains; the first block of a content keeps its name."""
        assert self._holders[block] > 0, f"block {block} is labelled by nobody who holds it"
        if label not in self._labelled and block not in self._labels:
            self._labels[block], self._labelled[label] = label, block

    def free(self, blocks: Sequence[int]) -> None:
        """One holder less. Of a sequence's blocks the last are evicted first: the first are a prefix without them."""
        for block in reversed(blocks):
            assert self._holders[block] > 0, f"block {block} freed twice"
            self._holders[block] -= 1
            if self._holders[block] > 0:
                continue
            if block in self._labels:
                self._kept[block] = None
            else:
                heapq.heappush(self._blank, block)

    def _take(self) -> int:
        block = heapq.heappop(self._blank) if self._blank else self._evict()
        self._holders[block] = 1
        return block

    def _evict(self) -> int:
        block, _ = self._kept.popitem(last=False)
        del self._labelled[self._labels.pop(block)]
        return block
