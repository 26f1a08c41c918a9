"""Lists of byte ranges to copy: checked once, cut into pieces, and copied the plain way."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Copies = NDArray[np.int64]  # [n, 3]: source offset, destination offset, length; all in bytes
Offsets = NDArray[np.int64]
CopyRanges = Callable[[memoryview, memoryview, Copies], None]  # source, destination, copies


def check(copies: Copies, source_bytes: int, destination_bytes: int) -> None:
    """Raises ValueError unless `copies` is int64 [n, 3] and every range lies inside both pools."""
    if copies.dtype != np.int64 or copies.ndim != 2 or copies.shape[1] != 3:
        raise ValueError(f"copies must be int64 of shape [n, 3], not {copies.dtype} of {list(copies.shape)}")
    # Written as a subtraction, because offset + length may overflow.
    bounds = np.array([source_bytes, destination_bytes], np.int64)
    offsets, lengths = copies[:, :2], copies[:, 2:]
    if (offsets < 0).any() or (lengths < 0).any() or (lengths > bounds - np.minimum(offsets, bounds)).any():
        raise ValueError(f"a range lies outside the source of {source_bytes} or the destination of {destination_bytes}")


def cut(copies: Copies, max_bytes: int, max_count: int) -> list[Copies]:
    """The same copies in the same order as a list of pieces, each of at most `max_count` ranges and less than twice
    `max_bytes` bytes. A long range is split."""
    parts = -(-copies[:, 2] // max_bytes)
    rows = np.repeat(copies, parts, axis=0)
    part = np.arange(len(rows)) - np.repeat(pack(parts), parts)
    rows[:, :2] += (part * max_bytes)[:, None]
    rows[:, 2] = np.minimum(max_bytes, rows[:, 2] - part * max_bytes)
    window = pack(rows[:, 2]) // max_bytes
    number = np.arange(len(rows)) // max_count
    borders = np.flatnonzero((np.diff(window) != 0) | (np.diff(number) != 0)) + 1
    return np.split(rows, borders) if len(rows) else []


def pack(lengths: Offsets) -> Offsets:
    """Where each range begins when all of them lie one after another. [n]"""
    return np.cumsum(lengths) - lengths


class Scratch:
    """Memory to pack ranges into, kept from one use to the next because fresh pages are dear."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def view(self, num_bytes: int) -> memoryview:
        """The same memory every time: only one may be in use."""
        if len(self._buffer) < num_bytes:
            self._buffer = bytearray(num_bytes)
        return memoryview(self._buffer)[:num_bytes]


def copy_ranges(source: memoryview, destination: memoryview, copies: Copies) -> None:
    """One memmove for each range, in order; other threads run meanwhile. Raises ValueError as `check` does."""
    check(copies, len(source), len(destination))
    from_ = np.frombuffer(source, np.uint8).ctypes.data
    to = np.frombuffer(destination, np.uint8).ctypes.data
    for source_offset, destination_offset, length in copies.tolist():
        ctypes.memmove(to + destination_offset, from_ + source_offset, length)
