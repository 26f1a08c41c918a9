"""A matrix of weights, packed once for the products of this machine. Native only: see kernels.cpu.NATIVE."""

from __future__ import annotations

import numpy as np

from kernels import _native
from kernels._native import PackedWeight, pack
from kernels.kinds import ITEM_TYPES, Floats, Indices, Items, Kind

__all__ = ["PackedWeight", "embed", "multiply", "pack_weight"]


def pack_weight(matrix: Items, kind: Kind, gated: bool = False) -> PackedWeight:
    """`matrix`: [outputs, inputs], copied. float16 is kept as float32. With `gated` the first half of the outputs are
    gates and the second half what they multiply: the product is then silu(gate) * value, half as wide. Raises
    TypeError when the items are not of that kind, ValueError for an odd number of gated outputs."""
    if matrix.dtype != ITEM_TYPES[kind]:
        raise TypeError(f"a matrix of {kind} comes as {ITEM_TYPES[kind].__name__}, not {matrix.dtype}")
    return pack(np.ascontiguousarray(matrix), kind, gated)


def multiply(rows: Floats, weight: PackedWeight) -> Floats:
    """rows Wᵀ: [rows, inputs] to [rows, outputs] float32, summed in float32. With weights of bfloat16 the rows are
    rounded to it first, and so is what gated weights give. Raises ValueError where sizes do not fit."""
    width = weight.rows // 2 if weight.gated else weight.rows
    result = np.empty((len(rows), width), np.float32)
    _native.multiply(weight, rows, result)
    return result


def embed(ids: Indices, weight: PackedWeight) -> Floats:
    """Rows of W: [ids] to [ids, inputs]. Raises ValueError when there is no such row."""
    result = np.empty((len(ids), weight.columns), np.float32)
    _native.embed(weight, ids, result)
    return result
