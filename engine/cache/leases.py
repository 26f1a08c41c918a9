"""Promises that a prefill's finished blocks stay as they are until decode has read them.

    grant ──▶ alive (epoch word = epoch) ──renew──▶ alive … ──release | expiry | reader lost──▶ ended (epoch word = 0)

The word is cleared *before* the blocks return to the pool, so a reader that still finds its epoch after its last read
has read what it was promised.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from engine.core import Sequence
from kvtransfer.protocol import Key


@dataclass(slots=True, eq=False)
class Lease:
    """One sequence's blocks, held for one reader."""

    key: Key
    sequence: Sequence
    epoch: int
    slot: int
    reader: str | None  # engine id; None until somebody asks (LMDeploy's order)
    expires: float  # time.monotonic() seconds
    num_announced: int = 0  # blocks the reader has been told of
    first_logprobs: bytes = b""  # msgpack of TokenLogprobs, for the first token


class LeaseTable:
    """Owns the epoch words; never the blocks."""

    def __init__(self, words: memoryview, lease_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        """`words`: the owner's words of kvtransfer/epochs.py, format 'q', all zero; they bound the leases alive."""
        self._words = words
        self._lease_seconds = lease_seconds
        self._clock = clock
        self._leases: dict[Key, Lease] = {}
        self._slots = list(range(len(words)))
        self._epoch = 0

    def __len__(self) -> int:
        return len(self._leases)

    def __iter__(self) -> Iterator[Lease]:
        return iter(list(self._leases.values()))

    @property
    def full(self) -> bool:
        return not self._slots

    def get(self, key: Key) -> Lease | None:
        return self._leases.get(key)

    def grant(self, key: Key, sequence: Sequence, reader: str | None) -> Lease:
        assert key not in self._leases, f"{key} granted twice"
        self._epoch += 1
        lease = Lease(key, sequence, self._epoch, self._slots.pop(), reader, self._clock() + self._lease_seconds)
        self._words[lease.slot] = lease.epoch
        self._leases[key] = lease
        return lease

    def renew(self, lease: Lease) -> None:
        lease.expires = self._clock() + self._lease_seconds

    def end(self, key: Key) -> Lease | None:
        """Clears the epoch word; the caller frees the blocks next. None when it has ended before."""
        lease = self._leases.pop(key, None)
        if lease is not None:
            self._words[lease.slot] = 0
            self._slots.append(lease.slot)
        return lease

    def expired(self) -> list[Lease]:
        now = self._clock()
        return [lease for lease in self._leases.values() if lease.expires <= now]

    def of_session(self, session: int) -> list[Lease]:
        return [lease for lease in self._leases.values() if lease.key.session == session]

    def of_reader(self, reader: str) -> list[Lease]:
        return [lease for lease in self._leases.values() if lease.reader == reader]
