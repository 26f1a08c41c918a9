"""Prompts that begin like an earlier sequence reuse its blocks.

A full block is named by a digest of its tokens and of everything before them, so equal names mean equal prefixes:

    digest(0) = H(salt, tokens[0:16])      digest(i) = H(digest(i-1), tokens[16i:16i+16])

The hash is cryptographic because prompts come from strangers: nobody can craft a prompt that reads another's blocks. A
`cache_salt` keeps tenants apart, so that no timing tells what others have asked.
"""

from __future__ import annotations

import hashlib
from array import array

from engine.cache.pool import BlockPool
from engine.core import Sequence

DIGEST_BYTES = 16


class PrefixCache:
    """Finds and names full blocks. Disabled, it finds and names nothing."""

    def __init__(self, pool: BlockPool, enabled: bool = True) -> None:
        self._pool = pool
        self._enabled = enabled

    def match(self, sequence: Sequence) -> list[int]:
        """The longest run of leading blocks whose content is in the pool; nobody holds it for us yet. The last known
        token is never included: it must be computed for its logits."""
        if not self._enabled:
            return []
        blocks: list[int] = []
        for index in range((len(sequence.tokens) - 1) // self._pool.block_size):
            block = self._pool.find(self._digest(sequence, index))
            if block is None:
                break
            blocks.append(block)
        return blocks

    def insert(self, sequence: Sequence, computed_before: int) -> None:
        """Names the blocks that were filled since `computed_before` tokens were computed."""
        if not self._enabled:
            return
        size = self._pool.block_size
        for index in range(computed_before // size, sequence.num_computed // size):
            self._pool.label(sequence.block_table[index], self._digest(sequence, index))

    def _digest(self, sequence: Sequence, index: int) -> bytes:
        digests, size = sequence.digests, self._pool.block_size
        while len(digests) <= index:
            start = len(digests) * size
            before = digests[-1] if digests else sequence.request.cache_salt.encode()
            hasher = hashlib.blake2b(before, digest_size=DIGEST_BYTES)
            hasher.update(b"\0" if digests else b"\1")  # a salt is no digest
            hasher.update(array("i", sequence.tokens[start : start + size]).tobytes())
            digests.append(hasher.digest())
        return digests[index]
