"""What every transport offers, and how one is chosen for a pair.

An `Endpoint` owns one registered pool region. Peers are told how to reach it by its `TransportOffer`; `connect` opens a
`Connection`, over which the *reader* pulls bytes out of the *owner's* pool: nobody ever writes another's pool.

Nothing here blocks the caller. `connect` and `pull` return at once; when `fileno()` turns readable, `poll()` returns
what happened. All calls come from the engine core's one thread; a transport may use threads of its own for the copying.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import msgspec

from kvtransfer.copies import Copies, CopyRanges, copy_ranges
from kvtransfer.memory import Region
from kvtransfer.offer import TransportOffer


class Connected(msgspec.Struct, frozen=True):
    """A connection is ready to pull. `gigabytes_per_s` is what the probe read at connect measured, 0.0 without one."""

    connection: Connection
    gigabytes_per_s: float


class Pulled(msgspec.Struct, frozen=True):
    """All bytes of one pull lie in our pool (not yet believed: the owner must confirm its epoch first)."""

    transfer_id: int
    num_bytes: int
    seconds: float


class PullFailed(msgspec.Struct, frozen=True):
    transfer_id: int
    reason: str


class ConnectionLost(msgspec.Struct, frozen=True):
    """The owner died, closed, or broke the protocol; every pull under way on it has had its PullFailed."""

    connection: Connection
    reason: str


class ReaderLost(msgspec.Struct, frozen=True):
    """On the owner's side: the peer that connected under `peer_id` is gone."""

    peer_id: str


Event = Connected | Pulled | PullFailed | ConnectionLost | ReaderLost


class Connection(Protocol):
    """This side reads, the other side owns."""

    peer_id: str
    transport: str

    def pull(self, transfer_id: int, copies: Copies, deadline_s: float) -> None:
        """Copies byte ranges of the peer's pool into ours: Pulled or PullFailed follows, once, within the deadline.
        Raises ValueError at once when a range lies outside either pool."""

    def close(self) -> None:
        """Idempotent. Pulls under way fail with PullFailed; no byte is written into our pool after that event."""


class Endpoint(Protocol):
    """One transport over one pool."""

    transport: str

    def offer(self) -> TransportOffer: ...

    def admit(self, peer_id: str, secret: bytes) -> None:
        """From now on the peer that proves `secret` may read; replaces what was admitted under the same id."""

    def expel(self, peer_id: str) -> None:
        """Closes the peer's reading connections and forgets its secret. Idempotent."""

    def connect(self, peer_id: str, offer: TransportOffer, my_id: str, secret: bytes, deadline_s: float) -> Connection:
        """Starts to connect, proving `secret` to the owner by HMAC over its challenge. Connected or ConnectionLost
        follows, within the deadline; ConnectionLost too when it is closed before it was Connected."""

    def fileno(self) -> int:
        """Readable when `poll` has something."""

    def poll(self) -> list[Event]: ...

    def close(self) -> None:
        """Closes every connection, joins every thread, leaves no file behind."""


TRANSPORTS = ("shm", "tcp")  # best first


def open_endpoint(transport: str, region: Region, host: str, copy: CopyRanges = copy_ranges) -> Endpoint:
    """An endpoint of the named transport over `region`; its module is imported only now. `host` is the address that
    peers reach this machine under; `copy` makes all copies in memory. Raises ValueError for an
    unknown name, OSError when this machine cannot do it."""
    match transport:
        case "shm":
            from kvtransfer.shm import ShmEndpoint

            return ShmEndpoint(region, host_id(), copy)
        case "tcp":
            from kvtransfer.tcp import TcpEndpoint

            return TcpEndpoint(region, host, host_id(), copy)
    raise ValueError(f"transport {transport!r} is not one of {', '.join(TRANSPORTS)}")


def host_id() -> str:
    """Equal for processes that can reach each other's abstract sockets and share memory."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{os.stat('/proc/self/ns/net').st_ino}"


def choose(
    ours: Sequence[TransportOffer], theirs: Sequence[TransportOffer], allowed: Sequence[str], require: str | None = None
) -> TransportOffer:
    """The peer's offer to connect to: the best transport that both sides offer, that is allowed here and that can work
    between these hosts. With `require` it is that one or none. Raises ValueError saying what was wanted and offered."""
    own = {offer.transport: offer for offer in ours}
    wanted = [require] if require is not None else [name for name in TRANSPORTS if name in allowed]
    usable = [offer for offer in theirs if offer.transport in wanted and _reaches(own.get(offer.transport), offer)]
    if not usable:
        names = ", ".join(offer.transport for offer in theirs) or "none"
        raise ValueError(f"no transport to this peer: {', '.join(wanted)} wanted here, {names} offered there")
    return min(usable, key=lambda offer: wanted.index(offer.transport))


def _reaches(ours: TransportOffer | None, theirs: TransportOffer) -> bool:
    return ours is not None and (theirs.transport != "shm" or ours.host_id == theirs.host_id)
