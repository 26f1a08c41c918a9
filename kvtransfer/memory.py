"""The memory that a pool lives in: an anonymous file, so that another process can map it, with no name to leak.

The kernel frees it when its last holder dies, however it dies. Nothing appears in /dev/shm.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from contextlib import suppress
from pathlib import Path

from kvtransfer.presence import MADV_POPULATE_READ, MADV_POPULATE_WRITE, Presence

HUGE_PAGE_BYTES = 2 << 20
SHMEM_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
F_SEAL_FUTURE_WRITE = 0x10

# No peer can change the size (a reader would die of SIGBUS), map it for writing, or take these promises back.
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | F_SEAL_FUTURE_WRITE | fcntl.F_SEAL_SEAL


class Region:
    """Memory that this process owns and may lend. All of it is had from the start, so that none can be missing later;
    its pages are brought in behind the owner's back."""

    def __init__(self, fd: int, mapping: mmap.mmap, num_bytes: int, *, huge: bool) -> None:
        self.fd = fd
        self.num_bytes = num_bytes
        self.huge = huge  # in reserved huge pages, which sendfile cannot send
        self._mapping = mapping
        self.presence = Presence(mapping, MADV_POPULATE_WRITE)
        self.buffer = memoryview(mapping)[:num_bytes]  # writable, [num_bytes] of uint8

    @classmethod
    def allocate(cls, num_bytes: int) -> Region:
        """Zeroed, page-aligned, in huge pages where the machine has some. Raises MemoryError when it does not fit."""
        if num_bytes < 1:
            raise ValueError(f"a region of {num_bytes} bytes holds nothing")
        if num_bytes > (available := _available_bytes()):
            raise MemoryError(f"a pool of {num_bytes >> 20} MiB does not fit: {available >> 20} MiB are available")
        try:
            huge = _map_huge(num_bytes)
            fd, mapping = huge or _map(num_bytes, mmap.PAGESIZE, 0)
        except OSError as error:
            raise MemoryError(f"no memory for a pool of {num_bytes >> 20} MiB: {error.strerror}") from error
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
        return cls(fd, mapping, num_bytes, huge=huge is not None)

    def close(self) -> None:
        """Idempotent. Arrays made from `buffer` stay valid: the memory goes when the last of them does."""
        if self.fd < 0:
            return
        self.presence.stop()
        os.close(self.fd)
        self.fd = -1
        _unmap(self.buffer, self._mapping)


class BorrowedRegion:
    """Another process's region, mapped for reading alone."""

    def __init__(self, mapping: mmap.mmap, num_bytes: int) -> None:
        self._mapping = mapping
        self._presence = Presence(mapping, MADV_POPULATE_READ)
        self.buffer = memoryview(mapping)[:num_bytes]  # read-only

    @classmethod
    def of(cls, fd: int, num_bytes: int) -> BorrowedRegion:
        """Maps a descriptor that a peer sent, which stays open and the caller's. Raises ValueError when it is not a
        sealed memory file of at least `num_bytes`: one that can shrink would kill its readers."""
        try:
            seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        except OSError:
            raise ValueError("the peer sent a descriptor that is no memory file") from None
        if not seals & fcntl.F_SEAL_SHRINK:
            raise ValueError("the peer sent a memory file that could shrink")
        size = os.fstat(fd).st_size
        if not 0 < num_bytes <= size < num_bytes + HUGE_PAGE_BYTES:
            raise ValueError(f"the peer offered {num_bytes} bytes and sent {size}")
        return cls(mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ), num_bytes)  # huge pages unmap only whole

    def close(self) -> None:
        """Idempotent."""
        self._presence.stop()
        _unmap(self.buffer, self._mapping)


def _available_bytes() -> int:
    """Asked beforehand: the kernel would grant the address space, then kill somebody when the pages are touched."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return int(fields["MemAvailable"].split()[0]) << 10


def _map_huge(num_bytes: int) -> tuple[int, mmap.mmap] | None:
    """In reserved huge pages; None when there are too few."""
    try:
        return _map(num_bytes, HUGE_PAGE_BYTES, os.MFD_HUGETLB)
    except OSError:
        return None


def _map(num_bytes: int, page_bytes: int, flags: int) -> tuple[int, mmap.mmap]:
    fd = os.memfd_create("tandem-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | flags)
    try:
        size = -(-num_bytes // page_bytes) * page_bytes
        os.ftruncate(fd, size)
        mapping = mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        with suppress(OSError):  # this kernel has no transparent huge pages for shared memory
            mapping.madvise(mmap.MADV_HUGEPAGE)
        if _huge_by_advice():
            with suppress(OSError):  # before Linux 5.14
                mapping.madvise(MADV_POPULATE_WRITE)
        os.posix_fallocate(fd, 0, size)  # fails when it does not fit; the first touch could only kill us
    except OSError:
        os.close(fd)
        raise
    return fd, mapping


def _huge_by_advice() -> bool:
    """Whether touching gives huge pages, which takes little time, and allocating unseen only small ones."""
    with suppress(OSError):
        return "[advise]" in SHMEM_HUGE_PAGES.read_text()
    return False


def _unmap(buffer: memoryview, mapping: mmap.mmap) -> None:
    with suppress(BufferError):  # somebody still looks: the mapping goes with the last view
        buffer.release()
        mapping.close()
