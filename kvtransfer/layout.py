"""Where a token's keys and values lie in a pool, and which bytes to copy between two pools.

A pool is block-major, `[block][layer][k|v][kv_head][token][dim]`: one block is one contiguous run over all layers, so
equal layouts move in few large copies; a range of heads stays contiguous within each K or V plane.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
MAX_POOL_BYTES = 1 << 48  # no address space is larger; keeps every offset far inside an int64

Copies = NDArray[np.int64]  # [n, 3]: source offset, destination offset, length; all in bytes
Offsets = NDArray[np.int64]


class KVLayout(msgspec.Struct, frozen=True, kw_only=True):
    """The shape of one rank's pool. Heads [first_head, first_head + num_kv_heads) of the model's `total_kv_heads`."""

    num_blocks: int
    block_size: int  # tokens
    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    first_head: int = 0
    total_kv_heads: int = 0  # 0: num_kv_heads, no tensor parallelism

    def __post_init__(self) -> None:
        """Layouts come from peers: one that describes nothing real is refused where it is parsed. Raises ValueError."""
        sizes = (self.num_blocks, self.block_size, self.num_layers, self.num_kv_heads, self.head_dim)
        if min(sizes) < 1 or max(sizes) > MAX_POOL_BYTES:
            raise ValueError(f"every size of a KV layout must be positive, got {sizes}")
        if self.dtype not in ITEM_BYTES:
            raise ValueError(f"KV dtype {self.dtype!r} is not one of {', '.join(ITEM_BYTES)}")
        if self.first_head < 0 or self.total_kv_heads < 0 or self.first_head + self.num_kv_heads > self.model_kv_heads:
            raise ValueError(f"heads from {self.first_head} by {self.num_kv_heads} are not in {self.model_kv_heads}")
        if self.pool_bytes > MAX_POOL_BYTES:
            raise ValueError(f"a pool of {self.pool_bytes} bytes is larger than any address space")

    @property
    def model_kv_heads(self) -> int:
        """KV heads of the whole model, over all tensor-parallel ranks."""
        return self.total_kv_heads or self.num_kv_heads

    @property
    def item_bytes(self) -> int:
        return ITEM_BYTES[self.dtype]

    @property
    def token_bytes(self) -> int:
        """One token of one head of one plane."""
        return self.head_dim * self.item_bytes

    @property
    def head_bytes(self) -> int:
        """One head of one plane of one block: [token][dim]."""
        return self.block_size * self.token_bytes

    @property
    def plane_bytes(self) -> int:
        """One K or V of one layer of one block: [kv_head][token][dim]."""
        return self.num_kv_heads * self.head_bytes

    @property
    def block_bytes(self) -> int:
        return self.num_layers * 2 * self.plane_bytes

    @property
    def pool_bytes(self) -> int:
        return self.num_blocks * self.block_bytes

    @property
    def heads(self) -> tuple[int, int]:
        """The model's heads that this rank holds, as a half-open range."""
        return self.first_head, self.first_head + self.num_kv_heads


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
