"""How many warps run a program."""

from __future__ import annotations

ITEMS_A_WARP = 256  # eight for each of its 32 threads: 16-byte loads of a 16-bit dtype
MOST_WARPS = 16


def warps_for(items: int) -> int:
    """For a program over so many items, a power of two."""
    return min(max(items // ITEMS_A_WARP, 1), MOST_WARPS)
