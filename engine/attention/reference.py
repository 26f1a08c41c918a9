"""Paged attention in plain torch, for any device: the slow obvious version that compiled kernels are held to.

A batch is cut into parts that one call of scaled_dot_product_attention can do: rows with one new token are gathered and
padded together with others of about their length; a row with more is a part of its own. Parts depend on the batch and
on a layer's window only, so they are made once per step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from engine.attention.metadata import Batch, Indices
from engine.attention.pool import PagedPool

PADDING_LIMIT = 0.75  # rows are gathered together while the shortest has this share of the longest one's tokens
PADDING_FREE_TOKENS = 64  # … or lacks at most so many

Mask = NDArray[np.bool_]


class ReferenceAttention:
    def __init__(self, pool: PagedPool, windows: Sequence[int | None]) -> None:
        """`windows`: per layer, how many tokens back a token sees, itself included; None is all."""
        self.pool = pool
        self.windows = tuple(windows)

    def plan(self, batch: Batch) -> ReferenceStep:
        parts = {window: list(_parts(self.pool, batch, window)) for window in set(self.windows)}
        return ReferenceStep(self.pool, _store_rows(self.pool, batch), [parts[window] for window in self.windows])


class Part(Protocol):
    def attend(self, planes: Tensor, heads: Heads, output: Tensor) -> None:
        """Writes the part's tokens of `output` [tokens, heads, head_dim]."""


@dataclass(frozen=True, slots=True)
class Heads:
    """One layer's projections, fresh from the batch."""

    queries: Tensor  # [tokens, heads, head_dim]
    keys: Tensor  # [tokens, kv_heads, head_dim]
    values: Tensor  # [tokens, kv_heads, head_dim]


@dataclass(frozen=True, slots=True)
class ReferenceStep:
    pool: PagedPool
    store_rows: Tensor  # [2, tokens * kv_heads]: where keys, and values, go in a layer's rows
    parts: list[list[Part]]  # per layer

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        rows, head_dim = self.pool.rows[layer], queries.shape[-1]
        rows.index_copy_(0, self.store_rows[0], keys.reshape(-1, head_dim))
        rows.index_copy_(0, self.store_rows[1], values.reshape(-1, head_dim))
        output = torch.empty(queries.shape, dtype=queries.dtype, device=queries.device)
        for part in self.parts[layer]:
            part.attend(self.pool.planes[layer], Heads(queries, keys, values), output)
        return output.flatten(1)


@dataclass(frozen=True, slots=True)
class Context:
    """The pool's blocks of some sequences, gathered: every head's tokens in a row, padded to the longest."""

    planes: Tensor  # [2 * rows * kv_heads * blocks], indices into a layer's planes
    shape: tuple[int, ...]  # (2, rows, kv_heads, tokens, head_dim)
    beyond: Tensor | None  # indices, among the gathered [2 * rows * kv_heads * tokens], of what no row has written yet

    def gather(self, planes: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, each [rows, kv_heads, tokens, head_dim]."""
        gathered = planes.index_select(0, self.planes)
        if self.beyond is not None:
            # A mask alone would not do: a stranger's leftovers may be NaN, and NaN times a weight of 0 is NaN.
            gathered.view(-1, self.shape[-1]).index_fill_(0, self.beyond, 0)
        keys, values = gathered.view(self.shape)
        return keys, values


@dataclass(frozen=True, slots=True)
class OneTokenRows:
    """Rows with one new token each. The query heads that share a kv head take the place of query tokens."""

    tokens: Tensor  # [rows]: indices into the batch's tokens
    context: Context
    mask: Tensor | None  # [rows, 1, 1, context tokens], added to the scores

    def attend(self, planes: Tensor, heads: Heads, output: Tensor) -> None:
        keys, values = self.context.gather(planes)
        num_rows, num_kv_heads, _, head_dim = keys.shape
        queries = heads.queries.index_select(0, self.tokens).view(num_rows, num_kv_heads, -1, head_dim)
        attended = scaled_dot_product_attention(queries, keys, values, attn_mask=self.mask)
        output.index_copy_(0, self.tokens, attended.reshape(num_rows, -1, head_dim))


@dataclass(frozen=True, slots=True)
class OneRow:
    """One row with several new tokens."""

    tokens: slice
    context: Context | None  # None: the row starts at its sequence's first token, so all it sees is in the batch
    mask: Tensor | None  # [new tokens, context tokens], added to the scores; None: causal and no more

    def attend(self, planes: Tensor, heads: Heads, output: Tensor) -> None:
        if self.context:
            keys, values = (side[0] for side in self.context.gather(planes))  # [kv_heads, context, head_dim]
        else:
            keys, values = heads.keys[self.tokens].transpose(0, 1), heads.values[self.tokens].transpose(0, 1)
        num_kv_heads, num_context, head_dim = keys.shape
        queries = heads.queries[self.tokens].view(-1, num_kv_heads, self.share(heads), head_dim)
        shared = (num_kv_heads, self.share(heads), num_context, head_dim)
        attended = scaled_dot_product_attention(
            queries.permute(1, 2, 0, 3),  # [kv_heads, share, new, head_dim]
            keys.unsqueeze(1).expand(shared),
            values.unsqueeze(1).expand(shared),
            attn_mask=self.mask,
            is_causal=self.mask is None,
        )
        output[self.tokens].view(queries.shape).copy_(attended.permute(2, 0, 1, 3))

    @staticmethod
    def share(heads: Heads) -> int:
        """How many query heads read one kv head."""
        return heads.queries.shape[1] // heads.keys.shape[1]


def _store_rows(pool: PagedPool, batch: Batch) -> Tensor:
    layout = pool.layout
    slots = torch.from_numpy(batch.slots).to(pool.items.device)
    heads = torch.arange(layout.num_kv_heads, device=slots.device)
    block, offset = slots // layout.block_size, slots % layout.block_size
    plane = block[:, None] * (layout.num_layers * 2 * layout.num_kv_heads) + heads  # [tokens, kv_heads] of keys
    keys = (plane * layout.block_size + offset[:, None]).flatten()
    return torch.stack((keys, keys + layout.num_kv_heads * layout.block_size))


def _parts(pool: PagedPool, batch: Batch, window: int | None) -> Iterator[Part]:
    num_new = batch.num_new
    for rows in _groups_of_similar_length(np.flatnonzero(num_new == 1), batch.context_lengths):
        yield _one_token_rows(pool, batch, window, rows)
    for row in np.flatnonzero(num_new > 1):
        yield _one_row(pool, batch, window, int(row))


def _groups_of_similar_length(rows: Indices, lengths: Indices) -> Iterator[Indices]:
    """Longest first; every group wastes little on padding."""
    rows = rows[np.argsort(-lengths[rows], kind="stable")]
    while len(rows):
        longest = lengths[rows[0]]
        shortest = min(longest * PADDING_LIMIT, longest - PADDING_FREE_TOKENS)
        count = int(np.searchsorted(-lengths[rows], -shortest, side="right"))
        yield rows[:count]
        rows = rows[count:]


def _one_token_rows(pool: PagedPool, batch: Batch, window: int | None, rows: Indices) -> OneTokenRows:
    lengths = batch.context_lengths[rows]
    first = _first_block(lengths - 1, window, pool.layout.block_size)
    context, positions = _context(pool, batch, rows, first)
    seen = visible((lengths - 1)[:, None], positions, window)[:, None]  # [rows, 1, 1, tokens]
    return OneTokenRows(
        tokens=torch.from_numpy(batch.starts[rows]).to(pool.items.device),
        context=context,
        mask=_additive(seen, pool.items),
    )


def _one_row(pool: PagedPool, batch: Batch, window: int | None, row: int) -> OneRow:
    start, end = int(batch.starts[row]), int(batch.starts[row + 1])
    length = int(batch.context_lengths[row])
    queries = np.arange(length - (end - start), length)
    if queries[0] == 0:
        within = window is None or window >= length
        seen = None if within else visible(queries, queries, window)
        return OneRow(slice(start, end), None, None if seen is None else _additive(seen, pool.items))
    first = _first_block(queries[:1], window, pool.layout.block_size)
    context, positions = _context(pool, batch, np.array([row]), first)
    return OneRow(slice(start, end), context, _additive(visible(queries, positions[0], window), pool.items))


def visible(queries: Indices, keys: Indices, window: int | None) -> Mask:
    """Whether a query position [..., queries] sees a key position [..., keys]: [..., queries, keys]."""
    distance = queries[..., :, None] - keys[..., None, :]
    return (distance >= 0) & (distance < (window or np.iinfo(np.int64).max))


def _first_block(queries: Indices, window: int | None, block_size: int) -> Indices:
    """The first block that a sequence's earliest query still sees."""
    return np.zeros_like(queries) if window is None else np.maximum(queries - window + 1, 0) // block_size


def _context(pool: PagedPool, batch: Batch, rows: Indices, first: Indices) -> tuple[Context, Indices]:
    """Gathers rows' blocks from their `first` on; also the token positions gathered, [rows, tokens]."""
    layout, lengths = pool.layout, batch.context_lengths[rows]
    last = (lengths - 1) // layout.block_size
    blocks = np.arange((last - first).max() + 1) + first[:, None]  # [rows, blocks], of the sequence
    ids = np.take_along_axis(batch.block_tables[rows], np.minimum(blocks, last[:, None]), axis=1)
    sides, heads = np.arange(2)[:, None, None, None], np.arange(layout.num_kv_heads)[:, None]
    planes = (
        ids[:, None, :] * (2 * layout.num_layers) + sides
    ) * layout.num_kv_heads + heads  # [2, rows, heads, blocks]
    positions = np.arange(blocks.shape[1] * layout.block_size) + (first * layout.block_size)[:, None]
    shape = (2, len(rows), layout.num_kv_heads, positions.shape[1], layout.head_dim)
    beyond = np.flatnonzero(np.broadcast_to((positions >= lengths[:, None])[None, :, None, :], shape[:-1]))
    device = pool.items.device
    unwritten = torch.from_numpy(beyond).to(device) if len(beyond) else None
    return Context(torch.from_numpy(planes.ravel()).to(device), shape, unwritten), positions


def _additive(seen: Mask, like: Tensor) -> Tensor | None:
    """0 where seen, -inf where not; None when all is seen."""
    if seen.all():
        return None
    allowed = torch.from_numpy(seen).to(like.device)
    return torch.zeros(seen.shape, dtype=like.dtype, device=like.device).masked_fill_(~allowed, -torch.inf)
