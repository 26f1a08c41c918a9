"""The reader's end of a connection: what every transport's has in common.

One task owns a connection from dialling to its end. `close` and a loss both cancel that task; a loss leaves a reason.
However it ends, every pull gets exactly one event, and then, unless it was closed here, ConnectionLost follows.
"""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections import deque
from dataclasses import dataclass

import numpy as np

from kvtransfer.copies import Copies, CopyRanges, check
from kvtransfer.events import EventQueue
from kvtransfer.handshake import HandshakeError, check_id
from kvtransfer.memory import Region
from kvtransfer.offer import TransportOffer
from kvtransfer.reactor import Reactor
from kvtransfer.transfer import Connected, ConnectionLost, Event, Pulled, PullFailed

MAX_PULLS = 4096  # under way on one connection
PROBE_BYTES = 4 << 20
PROBE_RUNS = 3


@dataclass(slots=True, eq=False)
class Pull:
    transfer_id: int
    copies: Copies
    destination: memoryview
    started: float  # time.monotonic() seconds
    asked: bool = False  # the owner may be answering
    ended: bool = False  # its event is out: not another byte may be written
    timer: asyncio.TimerHandle | None = None


@dataclass(frozen=True, slots=True)
class Target:
    """What `Endpoint.connect` was asked to reach."""

    peer_id: str
    offer: TransportOffer
    my_id: str
    secret: bytes
    deadline_s: float


class ReadingConnection(ABC):
    """Implements transfer.Connection. `pull` and `close` belong to the core's thread, all else to the reactor's."""

    transport: str

    def __init__(self, target: Target, region: Region, copy: CopyRanges, reactor: Reactor, events: EventQueue) -> None:
        check_id(target.peer_id)
        check_id(target.my_id)
        self.peer_id = target.peer_id
        self._target = target
        self._region = region
        self._copy = copy
        self._reactor = reactor
        self._events = events
        self._pulls: deque[Pull] = deque()
        self._arrived = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._lost: str | None = None
        self._connected = False
        self._finished = False

    def start(self) -> None:
        self._reactor.call(self._start)

    def pull(self, transfer_id: int, copies: Copies, deadline_s: float) -> None:
        check(copies, self._target.offer.pool_bytes, len(self._region.buffer))
        pull = Pull(transfer_id, copies, self._region.buffer, time.monotonic())
        if not self._reactor.call(self._begin, pull, deadline_s):
            self._end(pull, PullFailed(transfer_id, "the endpoint is closed"))

    def close(self) -> None:
        self._reactor.call(self._close)

    @abstractmethod
    async def _open(self) -> None:
        """Dials and proves itself. Raises OSError, EOFError, ValueError or HandshakeError."""

    @abstractmethod
    async def _read(self, pull: Pull) -> None:
        """Makes the copies of one pull, and stops when `pull.ended`."""

    @abstractmethod
    async def _serve(self) -> None:
        """Ends the pulls of `_pulls` in order, until the owner is lost."""

    @abstractmethod
    def _release(self) -> None:
        """Gives back whatever `_open` took, however far it came."""

    def _start(self) -> None:
        self._task = self._reactor.start(self._run(), self._finish)

    def _begin(self, pull: Pull, deadline_s: float) -> None:
        if self._finished:
            self._end(pull, PullFailed(pull.transfer_id, self._lost or "the connection is closed"))
        elif len(self._pulls) >= MAX_PULLS:
            self._end(pull, PullFailed(pull.transfer_id, f"{MAX_PULLS} pulls are under way already"))
        else:
            pull.timer = self._reactor.loop.call_later(deadline_s, self._expire, pull)
            self._pulls.append(pull)
            self._arrived.set()

    def _close(self) -> None:
        if self._task is not None:
            self._task.cancel()

    def _lose(self, reason: str) -> None:
        if self._lost is None:
            self._lost = reason
        self._close()

    async def _next(self) -> Pull:
        """The oldest pull that has not ended; it stays in `_pulls` until it does."""
        while True:
            for pull in self._pulls:
                if not pull.asked:
                    return pull
            self._arrived.clear()
            await self._arrived.wait()

    async def _run(self) -> None:
        try:
            async with asyncio.timeout(self._target.deadline_s):
                await self._open()
                speed = await self._probe()
            self._connected = True
            self._events.push(Connected(self, speed))
            await self._serve()
        except TimeoutError:
            self._lost = f"no connection to {self.peer_id} within {self._target.deadline_s} s"
        except (OSError, EOFError, ValueError, HandshakeError) as error:
            self._lost = f"{self.transport} to {self.peer_id}: {error}"

    def _finish(self, task: asyncio.Task[None]) -> None:
        self._finished = True
        self._release()
        closed_here = task.cancelled() and self._lost is None
        reason = self._lost or ("the connection was closed here" if closed_here else "an internal error")
        for pull in list(self._pulls):
            self._end(pull, PullFailed(pull.transfer_id, reason))
        if not (closed_here and self._connected):
            self._events.push(ConnectionLost(self, reason))

    async def _probe(self) -> float:
        """Reads the start of the peer's pool into scratch memory a few times: the best of them, in GB/s."""
        scratch = bytearray(min(PROBE_BYTES, self._target.offer.pool_bytes))
        copies = np.array([[0, 0, len(scratch)]], np.int64)
        best_s = float("inf")
        for _ in range(PROBE_RUNS):
            started = time.monotonic()
            await self._read(Pull(-1, copies, memoryview(scratch), started))
            best_s = min(best_s, time.monotonic() - started)
        return len(scratch) / best_s / 1e9

    def _expire(self, pull: Pull) -> None:
        self._end(pull, PullFailed(pull.transfer_id, "the deadline passed"))

    def _succeed(self, pull: Pull) -> None:
        if not pull.ended:
            seconds = time.monotonic() - pull.started
            self._end(pull, Pulled(pull.transfer_id, int(pull.copies[:, 2].sum()), seconds))

    def _end(self, pull: Pull, event: Event) -> None:
        if pull.ended:
            return
        pull.ended = True
        if pull.timer is not None:
            pull.timer.cancel()
            self._pulls.remove(pull)
        self._events.push(event)
