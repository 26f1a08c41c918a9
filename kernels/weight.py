"""A matrix of weights, packed once for the products of this machine. Native only: see kernels.cpu.NATIVE."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kernels import _native
from kernels._native import PackedWeight, pack
from kernels.formats import BLOCKS, Format, Quantization, Quantized, item_type, row_items
from kernels.kinds import ITEM_TYPES, Floats, Indices, Items, Kind

__all__ = ["PackedWeight", "Part", "embed", "expand_rows", "multiply", "pack_parts", "pack_weight", "quantize"]


def pack_weight(matrix: Items, kind: Kind, gated: bool = False) -> PackedWeight:
    """`matrix`: [outputs, inputs], copied. With `gated` the first half of the outputs are
    gates and the second half what they multiply: the product is then silu(gate) * value, half as wide. Raises
    TypeError when the items are not of that kind, ValueError for an odd number of gated outputs."""
    if matrix.dtype != ITEM_TYPES[kind]:
        raise TypeError(f"a matrix of {kind} comes as {ITEM_TYPES[kind].__name__}, not {matrix.dtype}")
    return pack(np.ascontiguousarray(matrix), kind, gated)


@dataclass(frozen=True, slots=True)
class Part:
    """Some rows of a matrix: [rows, inputs] of a kind, or [rows, bytes per row] as a GGUF file holds them."""

    items: NDArray[Any]
    format: Format


def pack_parts(parts: Sequence[Part], columns: int, kind: Kind, gated: bool = False) -> PackedWeight:
    """The parts' rows one below the other, [outputs, columns], copied. Quantized rows stay as small as they are: their
    products are those of pack_weight over the same weights, dequantized to float32 and then rounded to `kind`.
    `gated` as for pack_weight. Raises TypeError when items are not of their format, ValueError where sizes do not
    fit."""
    for part in parts:
        _check_part(part, columns)
    items = [np.ascontiguousarray(part.items) for part in parts]
    return _native.pack_parts(items, [part.format for part in parts], columns, kind, gated)


def _check_part(part: Part, columns: int) -> None:
    expected, width = item_type(part.format), row_items(part.format, columns)
    if part.items.dtype != expected:
        raise TypeError(f"{part.format} comes as {expected.__name__}, not {part.items.dtype}")
    if part.items.ndim != 2 or part.items.shape[1] != width:
        raise ValueError(f"{columns} columns of {part.format} are rows of {width} items, not {part.items.shape}")


def expand_rows(rows: NDArray[np.uint8], format: Quantized, kind: Kind) -> Items:
    """[rows, bytes per row], as a GGUF file holds them, to [rows, columns] of the kind: float32 by the format, then
    rounded. Raises ValueError for half a block."""
    blocks, rest = divmod(rows.shape[1], BLOCKS[format].num_bytes)
    if rest:
        raise ValueError(f"rows of {rows.shape[1]} bytes are not whole blocks of {format}")
    items: Items = np.empty((len(rows), blocks * BLOCKS[format].length), ITEM_TYPES[kind])
    _native.expand(np.ascontiguousarray(rows), format, kind, items)
    return items


def quantize(matrix: Floats, format: Quantization) -> NDArray[np.uint8]:
    """[rows, columns] to [rows, bytes per row], as a GGUF file holds them, on all threads. q8_0 rounds; the others
    search for the scales that leave the least squared error. Raises ValueError when the format's blocks
    do not fill the columns."""
    rows = np.empty((len(matrix), row_items(format, matrix.shape[1])), np.uint8)
    _native.quantize(np.ascontiguousarray(matrix), format, rows)
    return rows


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
