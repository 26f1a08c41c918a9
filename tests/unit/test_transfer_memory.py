"""A region is sealed, present, and gone when its owner is."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import numpy as np
import pytest

from kvtransfer.memory import BorrowedRegion, Region


def test_a_region_is_zero_writable_and_shared() -> None:
    region = Region.allocate(10_000)
    lent = BorrowedRegion.of(region.fd, 10_000)
    assert len(region.buffer) == len(lent.buffer) == 10_000
    assert not any(region.buffer)
    region.buffer[9_999] = 7
    assert lent.buffer[9_999] == 7
    assert lent.buffer.readonly
    lent.close()
    lent.close()
    region.close()
    region.close()


def test_every_page_comes_by_itself() -> None:
    before = resident_bytes()
    region = Region.allocate(64 << 20)
    assert region.presence.wait(10)
    assert resident_bytes() - before > 60 << 20
    region.close()


def test_what_the_owner_writes_meanwhile_stays() -> None:
    region = Region.allocate(64 << 20)
    pages = np.frombuffer(region.buffer, np.uint8)[:: mmap.PAGESIZE]
    pages[:] = 7
    assert region.presence.wait(10)
    assert (pages == 7).all()
    region.close()


def test_all_of_it_is_had_from_the_start() -> None:
    region = Region.allocate(64 << 20)
    assert os.fstat(region.fd).st_blocks * 512 >= 64 << 20
    region.close()


def test_it_can_be_closed_at_any_moment() -> None:
    for _ in range(10):
        Region.allocate(32 << 20).close()


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def test_nobody_else_can_write_or_resize_it() -> None:
    region = Region.allocate(4096)
    with pytest.raises(PermissionError):
        mmap.mmap(region.fd, 4096, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    for size in (0, 8192):
        with pytest.raises(PermissionError):
            os.ftruncate(region.fd, size)
    region.close()


def test_an_array_outlives_the_region_it_was_made_from() -> None:
    region = Region.allocate(4096)
    array = np.frombuffer(region.buffer, np.uint8)
    region.close()
    array[0] = 1
    assert array[0] == 1


def test_more_than_there_is_is_refused_before_anything_is_touched() -> None:
    with pytest.raises(MemoryError, match="does not fit"):
        Region.allocate(1 << 45)


@pytest.mark.parametrize("num_bytes", [0, -1])
def test_an_empty_region_is_refused(num_bytes: int) -> None:
    with pytest.raises(ValueError, match="holds nothing"):
        Region.allocate(num_bytes)


def test_it_has_no_name_that_could_outlive_its_holders() -> None:
    region = Region.allocate(4096)
    assert os.readlink(f"/proc/self/fd/{region.fd}") == "/memfd:tandem-kv (deleted)"
    assert os.fstat(region.fd).st_nlink == 0
    region.close()
