"""The reference attention is plain dense attention, whatever the shapes, the paging and the mix of rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from engine.attention.metadata import Batch, batch_of
from engine.attention.pool import PagedPool
from engine.attention.reference import ReferenceAttention
from engine.core import Request, SamplingParams, Sequence, Step
from kvtransfer.layout import KVLayout

NUM_LAYERS = 2


@dataclass
class Case:
    """Sequences of which `computed` tokens lie in the pool already, and `new` come in this step."""

    computed: list[int]
    new: list[int]
    block_size: int
    num_kv_heads: int
    share: int  # query heads for each kv head
    head_dim: int
    window: int | None
    seed: int


cases = st.integers(1, 5).flatmap(
    lambda rows: st.builds(
        Case,
        computed=st.lists(st.one_of(st.integers(0, 40), st.just(150)), min_size=rows, max_size=rows),
        new=st.lists(st.one_of(st.just(1), st.integers(1, 20)), min_size=rows, max_size=rows),
        block_size=st.sampled_from([1, 4, 16]),
        num_kv_heads=st.integers(1, 3),
        share=st.integers(1, 4),
        head_dim=st.sampled_from([8, 32]),
        window=st.one_of(st.none(), st.integers(1, 30)),
        seed=st.integers(0, 1000),
    )
)


@settings(max_examples=150, deadline=None)
@given(case=cases)
def test_paged_attention_is_dense_attention(case: Case) -> None:
    torch.manual_seed(case.seed)
    tokens = [[random_token(case) for _ in range(length)] for length in lengths(case)]
    pool, sequences = filled_pool(case, tokens)
    batch = batch_of(Step(sequences, case.new), case.block_size)
    queries, keys, values = new_tokens(case, tokens)
    step = ReferenceAttention(pool, [case.window] * NUM_LAYERS).plan(batch)
    attended = step.attend(1, queries, keys, values)
    expected = [dense(case, computed, row) for computed, row in zip(case.computed, tokens, strict=True)]
    assert_close(attended, torch.cat(expected), rtol=1e-4, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(case=cases)
def test_a_step_writes_its_own_slots_and_no_other(case: Case) -> None:
    torch.manual_seed(case.seed)
    tokens = [[random_token(case) for _ in range(length)] for length in lengths(case)]
    pool, sequences = filled_pool(case, tokens)
    before = pool.items.clone()
    batch = batch_of(Step(sequences, case.new), case.block_size)
    ReferenceAttention(pool, [case.window] * NUM_LAYERS).plan(batch).attend(1, *new_tokens(case, tokens))
    changed = shaped(pool.items != before, pool.layout) & ~shaped(pool.items.isnan() & before.isnan(), pool.layout)
    # [blocks, layers, k|v, kv_heads, tokens, dim] to the (block, token) pairs of layer 1
    slots = changed[:, 1].any(-1).flatten(1, 2).any(1).flatten()
    assert not changed[:, 0].any()
    assert sorted(torch.nonzero(slots).flatten().tolist()) == sorted(batch.slots.tolist())


Token = tuple[Tensor, Tensor, Tensor]  # query [heads, dim], key and value [kv_heads, dim]


def lengths(case: Case) -> list[int]:
    return [computed + new for computed, new in zip(case.computed, case.new, strict=True)]


def random_token(case: Case) -> Token:
    heads = case.num_kv_heads * case.share
    key, value = torch.randn(2, case.num_kv_heads, case.head_dim)
    return torch.randn(heads, case.head_dim), key, value


def shaped(items: Tensor, layout: KVLayout) -> Tensor:
    """[block][layer][k|v][kv_head][token][dim]"""
    return items.view(layout.num_blocks, layout.num_layers, 2, layout.num_kv_heads, layout.block_size, layout.head_dim)


def filled_pool(case: Case, tokens: list[list[Token]]) -> tuple[PagedPool, list[Sequence]]:
    """A pool with layer 1 of the computed tokens written by plain indexing, NaN everywhere else."""
    needed = [-(-length // case.block_size) for length in lengths(case)]
    layout = KVLayout(
        num_blocks=sum(needed) + 3,
        block_size=case.block_size,
        num_layers=NUM_LAYERS,
        num_kv_heads=case.num_kv_heads,
        head_dim=case.head_dim,
        dtype="float32",
    )
    pool = PagedPool.allocated(layout, torch.device("cpu"))
    pool.items.fill_(torch.nan)
    blocks = torch.randperm(layout.num_blocks).tolist()
    tables = [[blocks.pop() for _ in range(count)] for count in needed]
    sequences = [sequence_with(table, length) for table, length in zip(tables, lengths(case), strict=True)]
    for sequence, row, computed in zip(sequences, tokens, case.computed, strict=True):
        sequence.num_computed = computed
        for position, (_, key, value) in enumerate(row[:computed]):
            block = sequence.block_table[position // case.block_size]
            shaped(pool.items, layout)[block, 1, :, :, position % case.block_size] = torch.stack((key, value))
    return pool, sequences


def sequence_with(block_table: list[int], length: int) -> Sequence:
    request = Request(id="test", prompt=[0] * length, sampling=SamplingParams(max_tokens=1, seed=0))
    sequence = Sequence.of(request, arrival=0.0)
    sequence.block_table = block_table
    return sequence


def new_tokens(case: Case, tokens: list[list[Token]]) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [tokens, heads, dim], keys and values [tokens, kv_heads, dim] of the step."""
    fresh = [token for row, computed in zip(tokens, case.computed, strict=True) for token in row[computed:]]
    queries, keys, values = (torch.stack(side) for side in zip(*fresh, strict=True))
    return queries, keys, values


def dense(case: Case, computed: int, tokens: list[Token]) -> Tensor:
    """The textbook: one query, one head, one softmax at a time. [new tokens, heads * dim]"""
    heads = range(case.num_kv_heads * case.share)
    answers = [attend_one(case, tokens, at, head) for at in range(computed, len(tokens)) for head in heads]
    return torch.stack(answers).view(len(tokens) - computed, -1)


def attend_one(case: Case, tokens: list[Token], position: int, head: int) -> Tensor:
    first = 0 if case.window is None else max(0, position - case.window + 1)
    seen = tokens[first : position + 1]
    keys, values = (torch.stack([token[side][head // case.share] for token in seen]) for side in (1, 2))
    scores = keys @ tokens[position][0][head] / case.head_dim**0.5
    answer: Tensor = scores.softmax(0) @ values
    return answer


def test_a_short_block_table_is_refused() -> None:
    sequence = sequence_with([0], length=9)
    with pytest.raises(IndexError, match="holds 1 blocks where it needs 2"):
        batch_of(Step([sequence], [9]), 8)


def test_positions_and_slots_are_those_of_the_block_tables() -> None:
    first, second = sequence_with([9, 4, 7], length=10), sequence_with([3], length=2)
    first.num_computed = 3
    batch: Batch = batch_of(Step([first, second], [6, 2]), 4)
    assert batch.positions.tolist() == [3, 4, 5, 6, 7, 8, 0, 1]
    assert batch.slots.tolist() == [39, 16, 17, 18, 19, 28, 12, 13]
    assert batch.sampled.tolist() == [7]  # the first row has a token left to compute
    assert np.array_equal(batch.context_lengths, [9, 2])
