"""Paged attention over one layer of a pool. Native only: see kernels.cpu.NATIVE; `reference_attention` is the same in
NumPy."""

from __future__ import annotations

import numpy as np

from kernels import _native
from kernels.kinds import Floats, Indices, Items, Kind


def attend(
    queries: Floats,  # [tokens, heads, dim]
    keys: Floats,  # [tokens, kv_heads, dim]
    values: Floats,  # [tokens, kv_heads, dim]
    starts: Indices,  # [rows + 1]: row i's tokens are [starts[i], starts[i + 1])
    lengths: Indices,  # [rows]: tokens of row i's sequence, its new ones included
    block_tables: Indices,  # [rows, most blocks]
    pool: Items,  # [block, layer, 2, kv_head, token, dim]
    kind: Kind,
    layer: int,
    scale: float | None = None,  # on the scores; None: 1 / sqrt(dim)
    soft_cap: float = 0.0,  # scores become cap * tanh(score / cap); 0: none
    window: int = 0,  # how many tokens back a token sees, itself included; 0: all
) -> Floats:
    """Stores keys and values in the pool, then attends causally, each row over its own sequence. Query heads are
    shared by the key-value heads in order. Returns [tokens, heads, dim]. Raises ValueError for an index that lies
    outside what it points into, and for sizes that do not fit."""
    result = np.empty_like(queries)
    scale = queries.shape[-1] ** -0.5 if scale is None else scale
    width = int(np.prod(keys.shape[1:]))
    flat_keys, flat_values = keys.reshape(-1, width), values.reshape(-1, width)
    _native.attend(
        queries,
        flat_keys,
        flat_values,
        starts,
        lengths,
        block_tables,
        pool,
        kind,
        layer,
        scale,
        soft_cap,
        window,
        result,
    )
    return result
