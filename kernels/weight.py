"""A matrix of weights, packed once for the products of this machine. Native only: see kernels.cpu.NATIVE."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from kernels._native import PackedWeight, pack

Kind = Literal["float32", "bfloat16", "float16"]
Matrix = NDArray[np.float32] | NDArray[np.uint16] | NDArray[np.float16]  # uint16 holds the bits of bfloat16

_ITEMS = {"float32": np.float32, "bfloat16": np.uint16, "float16": np.float16}

__all__ = ["Kind", "Matrix", "PackedWeight", "pack_weight"]


def pack_weight(matrix: Matrix, kind: Kind, gated: bool = False) -> PackedWeight:
    """`matrix`: [outputs, inputs], copied. float16 is kept as float32. With `gated` the first half of the outputs are
    gates and the second half what they multiply: the product is then silu(gate) * value, half as wide. Raises
    TypeError when the items are not of that kind, ValueError for an odd number of gated outputs."""
    if matrix.dtype != _ITEMS[kind]:
        raise TypeError(f"a matrix of {kind} comes as {_ITEMS[kind].__name__}, not {matrix.dtype}")
    return pack(np.ascontiguousarray(matrix), kind, gated)
