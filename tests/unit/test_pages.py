"""What FlashInfer is told of a batch: its pages, its spare rows, and its rows in the order that splits them."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.attention.metadata import Batch, batch_of
from engine.attention.pages import Pages, decodes_first
from engine.core import Request, SamplingParams, Sequence, Step

BLOCK_SIZE = 4

rows = st.lists(st.tuples(st.integers(0, 30), st.integers(1, 9), st.booleans()), min_size=1, max_size=8)


def batch_with(wanted: list[tuple[int, int, bool]]) -> Batch:
    """Rows of (computed, new, whether it samples); every known token is another number."""
    sequences, free, known = [], iter(range(1000)), iter(range(10_000))
    for computed, new, samples in wanted:
        prompt = [next(known) for _ in range(computed + new + (not samples))]
        request = Request(id="test", prompt=prompt, sampling=SamplingParams(max_tokens=1, seed=0))
        sequence = Sequence.of(request, arrival=0.0)
        sequence.num_computed = computed
        sequence.block_table = [next(free) for _ in range(-(-len(prompt) // BLOCK_SIZE))]
        sequences.append(sequence)
    return batch_of(Step(sequences, [new for _, new, _ in wanted]), BLOCK_SIZE)


def rows_of(batch: Batch) -> set[tuple[object, ...]]:
    """Each row's own numbers, whatever their order."""
    ends = zip(batch.starts[:-1], batch.starts[1:], strict=True)
    return {
        (
            *batch.tokens[start:end].tolist(),
            *batch.positions[start:end].tolist(),
            *batch.slots[start:end].tolist(),
            batch.context_lengths[row],
            batch.block_tables[row][0],
        )
        for row, (start, end) in enumerate(ends)
    }


@settings(max_examples=60, deadline=None)
@given(rows)
def test_pages_hold_every_token_of_every_row(wanted: list[tuple[int, int, bool]]) -> None:
    batch = batch_with(wanted)
    pages = Pages.of(batch.context_lengths, batch.block_tables, BLOCK_SIZE)
    assert len(pages) == len(wanted)
    assert {array.dtype for array in (pages.starts, pages.ids, pages.last_lengths)} == {np.dtype(np.int32)}
    for row, length in enumerate(batch.context_lengths):
        ids = pages.ids[pages.starts[row] : pages.starts[row + 1]]
        assert ids.tolist() == batch.block_tables[row][: len(ids)].tolist()
        assert (len(ids) - 1) * BLOCK_SIZE + pages.last_lengths[row] == length
        assert 1 <= pages.last_lengths[row] <= BLOCK_SIZE


def test_spare_rows_read_one_token_of_block_0() -> None:
    batch = batch_with([(5, 1, True)])
    padded = Pages.of(batch.context_lengths, batch.block_tables, BLOCK_SIZE).padded(3)
    assert padded.starts.tolist() == [0, 2, 3, 4]
    assert padded.ids.tolist() == [0, 1, 0, 0]
    assert padded.last_lengths.tolist() == [2, 1, 1]
    assert Pages.none().padded(2).starts.tolist() == [0, 1, 2]


@settings(max_examples=60, deadline=None)
@given(rows)
def test_decodes_come_first_and_nothing_else_changes(wanted: list[tuple[int, int, bool]]) -> None:
    batch = batch_with(wanted)
    ordered = decodes_first(batch)
    decodes = (ordered.num_new == 1).tolist()
    assert decodes == sorted(decodes, reverse=True)
    assert rows_of(ordered) == rows_of(batch)
    assert ordered.tokens[ordered.sampled].tolist() == batch.tokens[batch.sampled].tolist()
