"""A batch's block tables in the form that FlashInfer reads: pages, which are our blocks, in one ragged array of int32.

ids           | row 0's pages | row 1's | row 2's pages |
starts          0               3         5               8
last_lengths    tokens in each row's last page, 1 to block_size
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from engine.attention.metadata import Batch, Indices

Integers = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Pages:
    starts: Integers  # [rows + 1]
    ids: Integers  # [starts[-1]]
    last_lengths: Integers  # [rows]

    def __len__(self) -> int:
        """Rows."""
        return len(self.last_lengths)

    @classmethod
    def of(cls, lengths: Indices, block_tables: Indices, block_size: int) -> Pages:
        """For rows of so many tokens, [rows], with tables [rows, most blocks]."""
        counts = -(-lengths // block_size)
        used = np.arange(block_tables.shape[1]) < counts[:, None]
        return cls(
            starts=np.concatenate(([0], np.cumsum(counts))).astype(np.int32),
            ids=block_tables[used].astype(np.int32),
            last_lengths=(lengths - (counts - 1) * block_size).astype(np.int32),
        )

    @classmethod
    def none(cls) -> Pages:
        nothing = np.zeros(0, np.int32)
        return cls(np.zeros(1, np.int32), nothing, nothing)

    def padded(self, rows: int) -> Pages:
        """With more rows, up to so many, which read the first token of block 0: no kernel meets an empty row, and what
        comes of these is for nobody."""
        missing = rows - len(self)
        more_starts = self.starts[-1] + np.arange(1, missing + 1, dtype=np.int32)
        return Pages(
            starts=np.concatenate((self.starts, more_starts)),
            ids=np.concatenate((self.ids, np.zeros(missing, np.int32))),
            last_lengths=np.concatenate((self.last_lengths, np.ones(missing, np.int32))),
        )


def decodes_first(batch: Batch) -> Batch:
    """The same forward, its rows of one token before all others, so that either kind is one run of tokens. What
    samples comes out in the order in which it came in."""
    num_new = batch.num_new
    order = np.argsort(num_new > 1, kind="stable")
    if np.array_equal(order, np.arange(len(order))):
        return batch
    starts = np.concatenate(([0], np.cumsum(num_new[order])))
    moved = np.arange(starts[-1]) + np.repeat(batch.starts[:-1][order] - starts[:-1], num_new[order])
    place = np.empty_like(moved)  # where each of the batch's tokens has gone
    place[moved] = np.arange(len(moved))
    return replace(
        batch,
        tokens=batch.tokens[moved],
        sampled=place[batch.sampled],
        starts=starts,
        context_lengths=batch.context_lengths[order],
        block_tables=batch.block_tables[order],
    )
