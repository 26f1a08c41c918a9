"""The words behind a pool, which let a reader see by itself whether what it read was still promised.

    region = | pool: layout.pool_bytes | owner's epoch words | reader's words |
                                          8 bytes each          8 bytes each

The owner writes a lease's epoch into its word at grant and 0 before its blocks are reused. A reader pulls that word
into one of its own words after its last read.
"""

from __future__ import annotations

from kvtransfer.layout import KVLayout

WORD_BYTES = 8
OWNER_WORDS = 4096  # bounds the leases alive at once
READER_WORDS = 1024  # bounds the hand-offs being read at once


def region_bytes(layout: KVLayout) -> int:
    """How much memory to register for a pool and its words."""
    return layout.pool_bytes + WORD_BYTES * (OWNER_WORDS + READER_WORDS)


def owner_offset(layout: KVLayout, slot: int) -> int:
    """Byte offset of the owner's epoch word `slot`. Raises ValueError for a slot that is not there."""
    if not 0 <= slot < OWNER_WORDS:
        raise ValueError(f"epoch slot {slot} is outside 0..{OWNER_WORDS - 1}")
    return layout.pool_bytes + WORD_BYTES * slot


def reader_offset(layout: KVLayout, slot: int) -> int:
    return layout.pool_bytes + WORD_BYTES * (OWNER_WORDS + slot)


def owner_words(layout: KVLayout, region: memoryview) -> memoryview:
    start = owner_offset(layout, 0)
    return region[start : start + WORD_BYTES * OWNER_WORDS].cast("B").cast("q")


def reader_words(layout: KVLayout, region: memoryview) -> memoryview:
    start = reader_offset(layout, 0)
    return region[start : start + WORD_BYTES * READER_WORDS].cast("B").cast("q")
