"""Brings the pages of a pool in while its owner goes on: the first touch of a page costs several times what copying
into it does, and a gigabyte of them most of a second, which nobody should wait for at the start."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading

MADV_POPULATE_WRITE = 23
STRETCH_BYTES = 16 << 20  # a few milliseconds: as long as `stop` may wait
LEAST_PRIORITY = 19

_libc = ctypes.CDLL(None, use_errno=True)


class Presence:
    """A thread of the least priority. Until it has come to a page, that page comes with its first touch."""

    def __init__(self, mapping: mmap.mmap) -> None:
        """`mapping` must not be closed before `stop`."""
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._touch, args=(mapping,), name="pool-pages", daemon=True)
        self._thread.start()

    def wait(self, timeout_s: float) -> bool:
        """Whether it has been everywhere, within `timeout_s`."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def stop(self) -> None:
        """Idempotent."""
        self._stopping.set()
        self._thread.join()

    def _touch(self, mapping: mmap.mmap) -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LEAST_PRIORITY)  # of this thread alone
        pages = (ctypes.c_char * len(mapping)).from_buffer(mapping)
        for offset in range(0, len(mapping), STRETCH_BYTES):
            if self._stopping.is_set():
                return
            _populate(pages, offset, min(STRETCH_BYTES, len(mapping) - offset))


def _populate(pages: ctypes.Array[ctypes.c_char], offset: int, length: int) -> None:
    """Through ctypes, because mmap's own call would hold the interpreter lock meanwhile."""
    start = ctypes.c_void_p(ctypes.addressof(pages) + offset)
    failed = _libc.madvise(start, ctypes.c_size_t(length), MADV_POPULATE_WRITE)
    if failed and ctypes.get_errno() == errno.EINVAL:  # before Linux 5.14; reads, because the owner may be writing
        for page in range(offset, offset + length, mmap.PAGESIZE):
            pages[page]
