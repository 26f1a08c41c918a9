"""kernels.attention, written the slow, obvious way."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kernels.kinds import Floats, Indices, Items, Kind, narrowed, widened


def attend(
    queries: Floats,
    keys: Floats,
    values: Floats,
    starts: Indices,
    lengths: Indices,
    block_tables: Indices,
    pool: Items,
    kind: Kind,
    layer: int,
    scale: float | None = None,
    soft_cap: float = 0.0,
    window: int = 0,
) -> Floats:
    """See kernels.attention.attend."""
    result = np.empty_like(queries)
    block_size = pool.shape[4]
    for row, length in enumerate(lengths):
        new = slice(starts[row], starts[row + 1])
        positions = np.arange(length - (starts[row + 1] - starts[row]), length)
        blocks, offsets = block_tables[row][positions // block_size], positions % block_size
        pool[blocks, layer, 0, :, offsets] = narrowed(keys[new], kind)
        pool[blocks, layer, 1, :, offsets] = narrowed(values[new], kind)
        seen = np.arange(length)
        context = pool[block_tables[row][seen // block_size], layer, :, :, seen % block_size]  # [tokens, 2, heads, dim]
        cached = widened(context, kind).astype(np.float64)
        result[new] = _attend_row(queries[new], cached, positions, scale, soft_cap, window)
    return result


def _attend_row(
    queries: Floats, cached: NDArray[np.float64], positions: Indices, scale: float | None, soft_cap: float, window: int
) -> Floats:
    _, num_heads, dim = queries.shape
    share = num_heads // cached.shape[2]
    keys, values = np.repeat(cached, share, axis=2).transpose(1, 2, 0, 3)  # each [heads, tokens, dim]
    scores = np.einsum("thd,hsd->hts", queries, keys) * (dim**-0.5 if scale is None else scale)
    if soft_cap:
        scores = np.tanh(scores / soft_cap) * soft_cap
    distance = positions[:, None] - np.arange(keys.shape[1])
    hidden = (distance < 0) | (distance >= (window or np.inf))
    scores = np.where(hidden, -np.inf, scores)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    result: Floats = np.einsum("hts,hsd->thd", weights, values).astype(np.float32)
    return result
