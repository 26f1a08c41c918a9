"""The threads that the native kernels run on: one pool for this process. Native only: see kernels.cpu.NATIVE."""

from __future__ import annotations

from collections.abc import Sequence

from kernels import _native


def set_threads(count: int, cores: Sequence[int] = ()) -> None:
    """Replaces the pool; it begins with one thread, the caller's. With `cores`, one for each thread, every thread is
    bound to its own and the calling thread to the first. Raises ValueError where these do not fit."""
    _native.set_threads(count, list(cores))


def num_threads() -> int:
    return _native.num_threads()
