"""Brings the pages of a pool in while everybody goes on: the first touch of a page costs several times what copying
does, and a gigabyte of them most of a second, which nobody should wait for at the start."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading

import numpy as np
from numpy.typing import NDArray

MADV_POPULATE_READ = 22  # for those who may not write
MADV_POPULATE_WRITE = 23
STRETCH_BYTES = 16 << 20  # a few milliseconds: as long as `stop` may wait
LEAST_PRIORITY = 19

_libc = ctypes.CDLL(None, use_errno=True)


class Presence:
    """A thread of the least priority. Until it has come to a page, that page comes with its first touch."""

    def __init__(self, mapping: mmap.mmap, advice: int) -> None:
        """`advice`: one of the two above. `mapping` must not be closed before `stop`."""
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._touch, args=(mapping, advice), name="pool-pages", daemon=True)
        self._thread.start()

    def wait(self, timeout_s: float) -> bool:
        """Whether it has been everywhere, within `timeout_s`."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def stop(self) -> None:
        """Idempotent."""
        self._stopping.set()
        self._thread.join()

    def _touch(self, mapping: mmap.mmap, advice: int) -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LEAST_PRIORITY)  # of this thread alone
        pages = np.frombuffer(mapping, np.uint8)
        for offset in range(0, len(pages), STRETCH_BYTES):
            if self._stopping.is_set():
                return
            _populate(pages[offset : offset + STRETCH_BYTES], advice)


def _populate(stretch: NDArray[np.uint8], advice: int) -> None:
    """Through ctypes, because mmap's own call would hold the interpreter lock meanwhile."""
    failed = _libc.madvise(ctypes.c_void_p(stretch.ctypes.data), ctypes.c_size_t(len(stretch)), advice)
    if failed and ctypes.get_errno() == errno.EINVAL:  # before Linux 5.14; reads, because the owner may be writing
        stretch[:: mmap.PAGESIZE].max()
