"""Which bytes to copy so that a sequence's keys and values move from one pool to another."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kvtransfer.copies import Copies, Offsets
from kvtransfer.layout import KVLayout


def plan(
    source: KVLayout,
    destination: KVLayout,
    source_blocks: Sequence[int],
    destination_blocks: Sequence[int],
    first_token: int,
    num_tokens: int,
) -> Copies:
    """The fewest copies that bring tokens [first_token, first_token + num_tokens) of a sequence from pool to pool.

    `source_blocks` and `destination_blocks` are the whole block tables, from the sequence's token 0. Only the heads
    that both ranks hold are copied: none in common, no copies. Raises ValueError when the layouts cannot describe the
    same model, or a table is too short or names a block outside its pool.

    With equal block sizes a last block that is taken from its first token on is copied whole, so its tail receives
    bytes that mean nothing. Nothing of ours can be there yet: tokens arrive in order, over one connection, and a block
    that is not full is never shared. Nobody may read past the sequence's computed tokens: there may be NaNs.

        tokens        0 .............. 16 ............. 32 ......... 41
        copied        |==== block 0 ===|==== block 1 ===|= block 2 =|xx tail xx|
    """
    _check_same_model(source, destination)
    if first_token < 0 or num_tokens < 0:
        raise ValueError(f"tokens from {first_token} by {num_tokens} are no range")
    first_head, last_head = _common_heads(source, destination)
    if num_tokens == 0 or first_head >= last_head:
        return np.empty((0, 3), np.int64)
    starts, stops = _segments(source.block_size, destination.block_size, first_token, first_token + num_tokens)
    from_, to = _at(source, source_blocks, starts), _at(destination, destination_blocks, starts)
    whole = (stops - starts == source.block_size) & (stops - starts == destination.block_size)
    if source.heads == destination.heads:
        runs = _cross(from_, to, whole, _ZERO, _ZERO, source.block_bytes)
    else:
        planes = _planes(source, first_head), _planes(destination, first_head)
        runs = _cross(from_, to, whole, *planes, (last_head - first_head) * source.head_bytes)
    if not whole.all():
        heads = _heads(source, first_head, last_head), _heads(destination, first_head, last_head)
        token_runs = _cross(from_, to, ~whole, *heads, (stops - starts)[~whole, None] * source.token_bytes)
        runs = np.concatenate([token_runs, runs])  # with equal block sizes only the first segment can be partial
    return _merge(runs)


_ZERO = np.zeros(1, np.int64)


def _check_same_model(source: KVLayout, destination: KVLayout) -> None:
    for name in ("num_layers", "head_dim", "dtype", "model_kv_heads"):
        ours, theirs = getattr(destination, name), getattr(source, name)
        if ours != theirs:
            raise ValueError(f"the pools hold different models: {name} is {theirs} at the source and {ours} here")


def _common_heads(source: KVLayout, destination: KVLayout) -> tuple[int, int]:
    return max(source.heads[0], destination.heads[0]), min(source.heads[1], destination.heads[1])


def _segments(source_size: int, destination_size: int, first: int, last: int) -> tuple[Offsets, Offsets]:
    """Cuts tokens [first, last) at every block border of either side: starts and stops, each [segments]."""
    borders = [np.arange(first - first % size + size, last, size) for size in {source_size, destination_size}]
    cuts = np.unique(np.concatenate([[first], *borders, [last]]))
    starts, stops = cuts[:-1], cuts[1:].copy()
    if source_size == destination_size and starts[-1] % source_size == 0:
        stops[-1] = starts[-1] + source_size
    return starts, stops


def _at(layout: KVLayout, blocks: Sequence[int], tokens: Offsets) -> Offsets:
    """The byte offset of each token's first head in the first plane of its block. [segments]"""
    index = tokens // layout.block_size
    if index[-1] >= len(blocks):
        raise ValueError(f"token {tokens[-1]} is in block {index[-1]} of a table of {len(blocks)}")
    try:
        table = np.asarray(blocks, np.int64)[index]
    except OverflowError:
        raise ValueError(f"the block table names a block outside the pool of {layout.num_blocks}") from None
    if table.min() < 0 or table.max() >= layout.num_blocks:
        raise ValueError(f"the block table names a block outside the pool of {layout.num_blocks}")
    return table * layout.block_bytes + tokens % layout.block_size * layout.token_bytes


def _planes(layout: KVLayout, first_head: int) -> Offsets:
    """Where head `first_head` begins in each plane of a block. [planes]"""
    return np.arange(layout.num_layers * 2) * layout.plane_bytes + (first_head - layout.first_head) * layout.head_bytes


def _heads(layout: KVLayout, first_head: int, last_head: int) -> Offsets:
    """Where each head begins in each plane of a block. [planes * heads]"""
    heads = np.arange(last_head - first_head) * layout.head_bytes
    planes = _planes(layout, first_head)
    return np.repeat(planes, len(heads)) + np.tile(heads, len(planes))


def _cross(
    from_: Offsets, to: Offsets, chosen: NDArray[np.bool_], source: Offsets, destination: Offsets, length: Offsets | int
) -> Copies:
    """One copy for every chosen segment and every place inside a block: [segments * places, 3]."""
    copies = np.empty((np.count_nonzero(chosen), len(source), 3), np.int64)
    copies[:, :, 0] = from_[chosen, None] + source
    copies[:, :, 1] = to[chosen, None] + destination
    copies[:, :, 2] = length
    return copies.reshape(-1, 3)


def _merge(copies: Copies) -> Copies:
    """Joins each copy that goes on where the one before it ended, on both sides."""
    ends = copies[:-1, :2] + copies[:-1, 2:]
    begins = np.concatenate([[True], (copies[1:, :2] != ends).any(axis=1)])
    merged: Copies = copies[begins]
    merged[:, 2] = np.add.reduceat(copies[:, 2], np.flatnonzero(begins))
    return merged
