"""The kernels written the slow, obvious way: what the native ones are held to, and what runs where none were built."""

from __future__ import annotations

import ctypes

import numpy as np
from numpy.typing import NDArray


def copy_ranges(source: memoryview, destination: memoryview, copies: NDArray[np.int64]) -> None:
    """See kernels.cpu.copy_ranges."""
    for from_, to, length in copies.tolist():
        if min(from_, to, length) < 0 or from_ + length > len(source) or to + length > len(destination):
            raise ValueError(f"range {[from_, to, length]} lies outside {len(source)} or {len(destination)} bytes")
    from_address = np.frombuffer(source, np.uint8).ctypes.data
    to_address = np.frombuffer(destination, np.uint8).ctypes.data
    for from_, to, length in copies.tolist():
        ctypes.memmove(to_address + to, from_address + from_, length)  # lets other threads run meanwhile


def isa() -> str:
    """See kernels.cpu.isa."""
    return "reference"
