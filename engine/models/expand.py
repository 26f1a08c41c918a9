"""Stored numbers, expanded to the kind that a model computes in: piece by piece, on several threads."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, get_args

import numpy as np
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize
from numpy.typing import NDArray

from engine.models.errors import ModelLoadError
from engine.models.weights import StoredTensor
from kernels import cpu
from kernels.formats import BLOCKS
from kernels.kinds import ITEM_TYPES, Floats, Items, Kind, narrowed, widened

PIECE_ITEMS = 1 << 18  # expanded at a time: 1 MiB of float32, so that the passes over it stay in the cache
MAX_THREADS = 4
KINDS: dict[str, Kind] = {kind: kind for kind in get_args(Kind)}

Write = Callable[[slice, Items], None]  # rows of a tensor, and their items [rows, columns], a view or the caller's own


def expand(tensors: Iterable[tuple[StoredTensor, Write]], kind: Kind, cores: Collection[int] = ()) -> None:
    """Each tensor's rows, in any order, to its `write`, which several threads call at once, on these cores if any.
    Raises ModelLoadError for a format that nobody here can read."""
    pieces = [piece for tensor, write in tensors for piece in _pieces(tensor, write, kind)]
    wanted = set(cores) or os.sched_getaffinity(0)
    count = min(MAX_THREADS, len(wanted))
    with ThreadPoolExecutor(count, initializer=os.sched_setaffinity, initargs=(0, wanted)) as pool:
        list(pool.map(_Piece.expand, pieces))  # the list raises here what a piece raised there


def expanded(rows: NDArray[np.uint8], stored: str, kind: Kind) -> Items:
    """Stored rows [rows, bytes per row] as [rows, columns] of the kind; a view where they are of it already."""
    if stored == kind:
        return rows.view(ITEM_TYPES[kind])
    dense = KINDS.get(stored)
    wide = widened(rows.view(ITEM_TYPES[dense]), dense) if dense else _dequantised(rows, stored)
    return narrowed(wide, kind)


def floats(tensor: StoredTensor) -> Floats:
    """A vector, as float32 of the caller's own."""
    return np.array(expanded(tensor.rows, tensor.format, "float32").reshape(tensor.shape))


def _dequantised(rows: NDArray[np.uint8], stored: str) -> Floats:
    try:
        found: Floats = dequantize(rows, GGMLQuantizationType[stored.upper()])
    except NotImplementedError as error:
        raise ModelLoadError(f"the GGUF file holds {stored} tensors, which cannot be dequantised") from error
    return found


def _quickly_expanded(rows: NDArray[np.uint8], stored: str, kind: Kind) -> Items:
    """`expanded`, by the native kernels where they know the format."""
    if not (cpu.NATIVE and stored in BLOCKS):
        return expanded(rows, stored, kind)
    from kernels.weight import expand_rows  # needs the compiled module

    return expand_rows(rows, stored, kind)


class _Piece(NamedTuple):
    tensor: StoredTensor
    write: Write
    rows: slice
    kind: Kind

    def expand(self) -> None:
        self.write(self.rows, _quickly_expanded(self.tensor.rows[self.rows], self.tensor.format, self.kind))


def _pieces(tensor: StoredTensor, write: Write, kind: Kind) -> Iterator[_Piece]:
    step = max(1, PIECE_ITEMS // tensor.columns)
    for start in range(0, len(tensor.rows), step):
        yield _Piece(tensor, write, slice(start, start + step), kind)
