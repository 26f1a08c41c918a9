"""One step's index arrays: which tokens, at which positions, into which slots. Built once, used by every layer.

rows          | sequence 0, 5 new | 1 | 2 | sequence 3, 3 new |      ragged: no padding
starts          0                   5   6   7                   10
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from engine.core import Step

Indices = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Batch:
    """One forward. NumPy's arrays: a model on another device moves what it needs of them there."""

    tokens: Indices  # [tokens]
    positions: Indices  # [tokens], within each sequence
    slots: Indices  # [tokens]: block * block_size + offset, where each token's KV goes
    sampled: Indices  # [sampled rows]: the last token of each row that samples
    starts: Indices  # [rows + 1]: row i's tokens are [starts[i], starts[i + 1])
    context_lengths: Indices  # [rows]: tokens that row i's last token sees, itself included
    block_tables: Indices  # [rows, most blocks]: block ids in token order; past a row's end, its first block

    @property
    def num_new(self) -> Indices:
        return np.diff(self.starts)


def batch_of(step: Step, block_size: int) -> Batch:
    """Raises IndexError when a sequence's block table is too short for what the step asks of it."""
    num_new = np.array(step.num_new, dtype=np.int64)
    computed = np.array([sequence.num_computed for sequence in step.sequences], dtype=np.int64)
    starts = np.concatenate(([0], np.cumsum(num_new)))
    lengths = computed + num_new
    row_of_token = np.repeat(np.arange(len(num_new)), num_new)
    positions = np.arange(starts[-1]) + (computed - starts[:-1])[row_of_token]
    tables = _block_tables(step, -(-lengths // block_size))
    slots = tables[row_of_token, positions // block_size] * block_size + positions % block_size
    sampled = [last for i, last in enumerate(starts[1:] - 1) if step.samples(i)]
    return Batch(
        tokens=_new_tokens(step, int(starts[-1])),
        positions=positions,
        slots=slots,
        sampled=np.array(sampled, dtype=np.int64),
        starts=starts,
        context_lengths=lengths,
        block_tables=tables,
    )


def _new_tokens(step: Step, num_tokens: int) -> Indices:
    rows = zip(step.sequences, step.num_new, strict=True)
    slices = (sequence.tokens[sequence.num_computed : sequence.num_computed + count] for sequence, count in rows)
    return np.fromiter(chain.from_iterable(slices), dtype=np.int64, count=num_tokens)


def _block_tables(step: Step, num_blocks: Indices) -> Indices:
    """[rows, most blocks]. The padding names a block that the row owns, so that nobody ever reads another's."""
    for sequence, needed in zip(step.sequences, num_blocks, strict=True):
        if len(sequence.block_table) < needed:
            raise IndexError(f"{sequence.request.id} holds {len(sequence.block_table)} blocks where it needs {needed}")
    rows = zip(step.sequences, num_blocks.tolist(), strict=True)
    flat = np.fromiter(chain.from_iterable(row.block_table[:count] for row, count in rows), dtype=np.int64)
    first = np.concatenate(([0], np.cumsum(num_blocks)[:-1]))
    column = np.arange(num_blocks.max())[None, :]
    inside = column < num_blocks[:, None]
    tables: Indices = flat[first[:, None] + np.where(inside, column, 0)]
    return tables
