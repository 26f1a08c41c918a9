"""The kinds of numbers that weights and caches are made of, and bfloat16 for NumPy, which lacks it."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Kind = Literal["float32", "bfloat16", "float16"]
Floats = NDArray[np.float32]
Indices = NDArray[np.int64]
Items = NDArray[Any]  # of a kind: float32, float16, or uint16 that holds the bits of bfloat16

ITEM_TYPES: dict[Kind, type[np.generic]] = {"float32": np.float32, "bfloat16": np.uint16, "float16": np.float16}


def narrowed(items: Floats, kind: Kind) -> Items:
    """Rounded to nearest, ties to even; infinite beyond what the kind can hold. Not for NaN."""
    if kind != "bfloat16":
        with np.errstate(over="ignore"):
            return items.astype(ITEM_TYPES[kind])
    bits = np.ascontiguousarray(items, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def widened(items: Items, kind: Kind) -> Floats:
    if kind != "bfloat16":
        return items.astype(np.float32)
    return np.left_shift(items, 16, dtype=np.uint32).view(np.float32)
