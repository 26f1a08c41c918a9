"""One step's index arrays: which tokens, at which positions, into which slots. Built once, used by every layer.

rows          | sequence 0, 5 new | 1 | 2 | sequence 3, 3 new |      ragged: no padding
starts          0                   5   6   7                   10
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, chain

import numpy as np
from numpy.typing import NDArray

from engine.core import Step

Indices = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Batch:
    """One forward. NumPy's arrays: a model on another device moves what it needs of them there."""

    tokens: Indices  # [tokens]
    sampled: Indices  # [sampled rows]: the last token of each row that samples
    starts: Indices  # [rows + 1]: row i's tokens are [starts[i], starts[i + 1])
    context_lengths: Indices  # [rows]: tokens that row i's last token sees, itself included
    block_tables: Indices  # [rows, most blocks]: block ids in token order; past a row's end, its first block
    block_size: int

    @property
    def num_new(self) -> Indices:
        return np.diff(self.starts)

    # The native decoder finds these two itself, so they are made for those who ask.

    @property
    def positions(self) -> Indices:
        """[tokens], within each sequence."""
        first = self.context_lengths - self.starts[1:]  # position of a row's token minus its place in the batch
        return np.arange(self.starts[-1]) + np.repeat(first, self.num_new)

    @property
    def slots(self) -> Indices:
        """[tokens]: block * block_size + offset, where each token's KV goes."""
        rows, positions = np.repeat(np.arange(len(self.num_new)), self.num_new), self.positions
        blocks = self.block_tables[rows, positions // self.block_size]
        slots: Indices = blocks * self.block_size + positions % self.block_size
        return slots


def batch_of(step: Step, block_size: int) -> Batch:
    """Raises IndexError when a sequence's block table is too short for what the step asks of it. Lists until the end:
    for the few rows of a step NumPy's calls cost more than their work."""
    starts = [0, *accumulate(step.num_new)]
    lengths = [row.num_computed + count for row, count in zip(step.sequences, step.num_new, strict=True)]
    tokens = chain.from_iterable(
        row.tokens[row.num_computed : length] for row, length in zip(step.sequences, lengths, strict=True)
    )
    sampled = [end - 1 for i, end in enumerate(starts[1:]) if step.samples(i)]
    return Batch(
        tokens=np.fromiter(tokens, dtype=np.int64, count=starts[-1]),
        sampled=np.array(sampled, dtype=np.int64),
        starts=np.array(starts, dtype=np.int64),
        context_lengths=np.array(lengths, dtype=np.int64),
        block_tables=_block_tables(step, [-(-length // block_size) for length in lengths]),
        block_size=block_size,
    )


def _block_tables(step: Step, num_blocks: list[int]) -> Indices:
    """[rows, most blocks]. The padding names a block that the row owns, so that nobody ever reads another's."""
    tables = np.empty((len(num_blocks), max(num_blocks)), dtype=np.int64)
    for table, sequence, count in zip(tables, step.sequences, num_blocks, strict=True):
        if len(sequence.block_table) < count:
            raise IndexError(f"{sequence.request.id} holds {len(sequence.block_table)} blocks where it needs {count}")
        table[:count] = sequence.block_table[:count]
        table[count:] = sequence.block_table[0]
    return tables
