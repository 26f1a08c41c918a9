"""One step's index arrays: which tokens, at which positions, into which slots. Built once, used by every layer.

rows          | sequence 0, 5 new | 1 | 2 | sequence 3, 3 new |      ragged: no padding
starts          0                   5   6   7                   10
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.core import Sequence, Step

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
    rows = list(_rows(step))
    starts = [0, *accumulate(len(row.tokens) for row in rows)]
    return Batch(
        tokens=np.fromiter(chain.from_iterable(row.tokens for row in rows), dtype=np.int64, count=starts[-1]),
        sampled=np.array([end - 1 for end, row in zip(starts[1:], rows, strict=True) if row.samples], dtype=np.int64),
        starts=np.array(starts, dtype=np.int64),
        context_lengths=np.array([row.length for row in rows], dtype=np.int64),
        block_tables=_block_tables(rows, block_size),
        block_size=block_size,
    )


class _Row(NamedTuple):
    sequence: Sequence
    tokens: list[int]  # the new ones
    length: int  # of the context, with them
    samples: bool


def _rows(step: Step) -> Iterator[_Row]:
    """A drafted token is a row by itself, behind the one before it: its numbers are those of a step of its own."""
    for i, (sequence, count) in enumerate(zip(step.sequences, step.num_new, strict=True)):
        end = sequence.num_computed + count
        yield _Row(sequence, sequence.tokens[sequence.num_computed : end], end, step.samples(i))
        for length, token in enumerate(step.drafts.get(i, ()), end + 1):
            yield _Row(sequence, [token], length, True)


def _block_tables(rows: list[_Row], block_size: int) -> Indices:
    """[rows, most blocks]. The padding names a block that the row owns, so that nobody ever reads another's."""
    num_blocks = [-(-row.length // block_size) for row in rows]
    tables = np.empty((len(rows), max(num_blocks)), dtype=np.int64)
    for table, (sequence, *_), count in zip(tables, rows, num_blocks, strict=True):
        if len(sequence.block_table) < count:
            raise IndexError(f"{sequence.request.id} holds {len(sequence.block_table)} blocks where it needs {count}")
        table[:count] = sequence.block_table[:count]
        table[count:] = sequence.block_table[0]
    return tables
