"""plan() against the slow obvious version: copy token by token, head by head."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kvtransfer.layout import KVLayout
from kvtransfer.plan import plan

BLOCK = 16
LAYOUT = KVLayout(num_blocks=200, block_size=BLOCK, num_layers=30, num_kv_heads=3, head_dim=64, dtype="bfloat16")

Pool = NDArray[np.uint8]


@dataclass(frozen=True)
class Case:
    source: KVLayout
    destination: KVLayout
    source_blocks: list[int]
    destination_blocks: list[int]
    first_token: int
    num_tokens: int


def token_view(layout: KVLayout, pool: Pool) -> NDArray[np.uint8]:
    """[block, plane, head, token, bytes]"""
    shape = (layout.num_blocks, layout.num_layers * 2, layout.num_kv_heads, layout.block_size, layout.token_bytes)
    return pool.reshape(shape)


def random_pool(layout: KVLayout, seed: int) -> Pool:
    return np.random.default_rng(seed).integers(0, 256, layout.pool_bytes, np.uint8)


def slow_copy(case: Case, source: Pool, destination: Pool) -> None:
    """What plan() must amount to, without its tail."""
    from_, to = token_view(case.source, source), token_view(case.destination, destination)
    for token in range(case.first_token, case.first_token + case.num_tokens):
        source_block, source_slot = divmod(token, case.source.block_size)
        block, slot = divmod(token, case.destination.block_size)
        for head in sorted(set(range(*case.source.heads)) & set(range(*case.destination.heads))):
            to[case.destination_blocks[block], :, head - case.destination.first_head, slot] = from_[
                case.source_blocks[source_block], :, head - case.source.first_head, source_slot
            ]


def apply(case: Case, source: Pool, destination: Pool) -> int:
    copies = plan(
        case.source,
        case.destination,
        case.source_blocks,
        case.destination_blocks,
        case.first_token,
        case.num_tokens,
    )
    for from_, to, length in copies.tolist():
        assert length > 0
        assert 0 <= from_ <= from_ + length <= len(source)
        assert 0 <= to <= to + length <= len(destination)
        destination[to : to + length] = source[from_ : from_ + length]
    return len(copies)


@st.composite
def layouts(draw: st.DrawFn, model: KVLayout, num_tokens: int) -> tuple[KVLayout, list[int]]:
    """One rank's pool of `model` and a block table in it for `num_tokens` tokens."""
    block_size = draw(st.sampled_from([1, 2, 3, 4, 8]))
    first_head = draw(st.integers(0, model.total_kv_heads - 1))
    num_kv_heads = draw(st.integers(1, model.total_kv_heads - first_head))
    length = -(-num_tokens // block_size)
    num_blocks = length + draw(st.integers(1, 3))
    table = draw(st.one_of(st.just(list(range(length))), st.permutations(range(num_blocks)).map(lambda p: p[:length])))
    layout = msgspec.structs.replace(
        model, block_size=block_size, first_head=first_head, num_kv_heads=num_kv_heads, num_blocks=num_blocks
    )
    return layout, list(table)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    heads = draw(st.integers(1, 4))
    model = KVLayout(
        num_blocks=1,
        block_size=1,
        num_layers=draw(st.integers(1, 2)),
        num_kv_heads=heads,
        head_dim=2,
        dtype="float16",
        total_kv_heads=heads,
    )
    first_token, num_tokens = draw(st.integers(0, 20)), draw(st.integers(0, 20))
    source, source_blocks = draw(layouts(model, first_token + num_tokens))
    if draw(st.booleans()):
        destination, destination_blocks = source, list(reversed(source_blocks))
    else:
        destination, destination_blocks = draw(layouts(model, first_token + num_tokens))
    return Case(source, destination, source_blocks, destination_blocks, first_token, num_tokens)


def tail_mask(case: Case) -> NDArray[np.bool_]:
    """The documented tail: the rest of a last block taken from its first token on, block sizes being equal."""
    mask = np.zeros(case.destination.pool_bytes, bool)
    last, size = case.first_token + case.num_tokens, case.destination.block_size
    last_block = (last - 1) // size
    if case.source.block_size == size and case.num_tokens and last % size and last_block * size >= case.first_token:
        token_view(case.destination, mask)[case.destination_blocks[last_block], :, :, last % size :] = True
    return mask


@settings(max_examples=300, deadline=None)
@given(cases())
def test_copies_bring_exactly_the_tokens_asked_for(case: Case) -> None:
    source, before = random_pool(case.source, 1), random_pool(case.destination, 2)
    fast, slow = before.copy(), before.copy()
    apply(case, source, fast)
    slow_copy(case, source, slow)
    tail = tail_mask(case)
    assert np.array_equal(fast[~tail], slow[~tail])


def test_adjacent_blocks_of_equal_layouts_are_one_copy() -> None:
    copies = plan(LAYOUT, LAYOUT, [7, 8, 9], [100, 101, 102], 0, 3 * BLOCK)
    size = LAYOUT.block_bytes
    assert copies.tolist() == [[7 * size, 100 * size, 3 * size]]


def test_scattered_blocks_of_equal_layouts_are_one_copy_each() -> None:
    copies = plan(LAYOUT, LAYOUT, [5, 3, 4], [10, 20, 21], 0, 3 * BLOCK)
    size = LAYOUT.block_bytes
    assert copies.tolist() == [[5 * size, 10 * size, size], [3 * size, 20 * size, 2 * size]]


def test_a_partial_last_block_is_copied_whole() -> None:
    assert plan(LAYOUT, LAYOUT, [5], [9], 0, 3).tolist() == [[5 * LAYOUT.block_bytes, 9 * LAYOUT.block_bytes, 368_640]]


def test_a_partial_first_block_keeps_what_is_there() -> None:
    copies = plan(LAYOUT, LAYOUT, [5, 3], [9, 7], BLOCK - 1, 2)
    assert len(copies) == LAYOUT.num_layers * 2 * LAYOUT.num_kv_heads + 1


def test_half_the_heads_are_one_run_per_plane() -> None:
    whole = msgspec.structs.replace(LAYOUT, num_kv_heads=4, total_kv_heads=4)
    half = msgspec.structs.replace(LAYOUT, num_kv_heads=2, total_kv_heads=4, first_head=2)
    copies = plan(whole, half, [0, 1], [0, 1], 0, 2 * BLOCK)
    assert len(copies) == 2 * LAYOUT.num_layers * 2
    assert set(copies[:, 2].tolist()) == {half.plane_bytes}


def test_ranks_without_common_heads_copy_nothing() -> None:
    low = msgspec.structs.replace(LAYOUT, num_kv_heads=1, total_kv_heads=3, first_head=0)
    high = msgspec.structs.replace(LAYOUT, num_kv_heads=2, total_kv_heads=3, first_head=1)
    assert plan(low, high, [0], [0], 0, BLOCK).shape == (0, 3)


def test_two_source_ranks_fill_one_destination() -> None:
    whole = msgspec.structs.replace(LAYOUT, num_blocks=4, num_kv_heads=4, total_kv_heads=4)
    pool = np.zeros(whole.pool_bytes, np.uint8)
    for first_head in (0, 2):
        rank = msgspec.structs.replace(whole, num_kv_heads=2, first_head=first_head)
        apply(Case(rank, whole, [1, 0, 3], [2, 0, 1], 0, 40), np.full(rank.pool_bytes, first_head + 1, np.uint8), pool)
    view = token_view(whole, pool)[[2, 0]]
    assert (view[:, :, :2] == 1).all()
    assert (view[:, :, 2:] == 3).all()


@pytest.mark.parametrize(
    "change", [{"num_layers": 29}, {"head_dim": 32}, {"dtype": "float32"}, {"total_kv_heads": 6, "num_kv_heads": 3}]
)
def test_pools_of_different_models_are_refused(change: dict[str, int | str]) -> None:
    other = msgspec.structs.replace(LAYOUT, **change)
    with pytest.raises(ValueError, match="different models"):
        plan(LAYOUT, other, [0], [0], 0, 1)


@pytest.mark.parametrize(
    ("source", "destination"),
    [([0], [0, 1]), ([0, 1], [0]), ([0, 200], [0, 1]), ([0, 1], [-1, 0]), ([0, 1 << 63], [0, 1])],
)
def test_short_tables_and_strange_blocks_are_refused(source: list[int], destination: list[int]) -> None:
    with pytest.raises(ValueError, match="table"):
        plan(LAYOUT, LAYOUT, source, destination, 0, BLOCK + 1)


@pytest.mark.parametrize(("first_token", "num_tokens"), [(-1, 1), (0, -1)])
def test_negative_ranges_are_refused(first_token: int, num_tokens: int) -> None:
    with pytest.raises(ValueError, match="no range"):
        plan(LAYOUT, LAYOUT, [0], [0], first_token, num_tokens)


@pytest.mark.parametrize(
    "change",
    [
        {"num_blocks": 0},
        {"block_size": -1},
        {"dtype": "int3"},
        {"first_head": 1},
        {"first_head": -1, "total_kv_heads": 3},
        {"num_blocks": 1 << 47},
        {"head_dim": 1 << 80},
    ],
)
def test_a_peers_impossible_layout_is_refused_where_it_is_parsed(change: dict[str, int | str]) -> None:
    message = msgspec.json.encode(msgspec.structs.asdict(LAYOUT) | change)
    with pytest.raises(msgspec.MsgspecError):
        msgspec.json.decode(message, type=KVLayout)


def test_the_real_shape_is_planned_quickly() -> None:
    """2,000 tokens with everything different: 375 segments, 60 planes, 3 heads, still one numpy pass."""
    other = msgspec.structs.replace(LAYOUT, num_blocks=100, block_size=24)
    copies = plan(LAYOUT, other, range(125), range(84), 0, 2000)
    assert copies[:, 2].sum() == 2000 * LAYOUT.block_bytes // BLOCK
