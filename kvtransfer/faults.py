"""An endpoint that fails on purpose: wraps any other, so that tests see what a bad network or a bad peer would do.

Rules name pulls by their number over the endpoint's life, so a fault strikes where a test wants it, every time.
"""

from __future__ import annotations

import select
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import msgspec
import numpy as np

from kvtransfer.copies import Copies
from kvtransfer.events import EventQueue
from kvtransfer.memory import Region
from kvtransfer.offer import TransportOffer
from kvtransfer.transfer import Connected, Connection, ConnectionLost, Endpoint, Event, Pulled, PullFailed


class Fault(StrEnum):
    DROP = "drop"  # the pull is never made: PullFailed at its deadline
    DELAY = "delay"  # its event comes late
    CORRUPT = "corrupt"  # it succeeds, with one byte of every range wrong
    CUT = "cut"  # the connection is lost while it is under way


class Rule(msgspec.Struct, frozen=True, kw_only=True):
    """Strikes pulls [first, first + count)."""

    fault: Fault
    first: int = 0
    count: int = 1
    delay_s: float = 0.0  # of DELAY


@dataclass(frozen=True, slots=True)
class Struck:
    """A pull that a rule strikes, until its event comes."""

    rule: Rule
    connection: Connection
    copies: Copies


class FaultyEndpoint:
    """Implements transfer.Endpoint over another one, whose region must be given for CORRUPT to write to."""

    def __init__(self, inner: Endpoint, region: Region, rules: Sequence[Rule]) -> None:
        self.transport = inner.transport
        self._inner = inner
        self._region = region
        self._rules = tuple(rules)
        self._num_pulls = 0
        self._struck: dict[int, Struck] = {}  # by transfer id
        self._connections: dict[Connection, FaultyConnection] = {}
        self._timers: set[threading.Timer] = set()
        self._events = EventQueue()
        self._ready = select.epoll()
        for source in (inner, self._events):
            self._ready.register(source.fileno(), select.EPOLLIN)

    def offer(self) -> TransportOffer:
        return self._inner.offer()

    def admit(self, peer_id: str, secret: bytes) -> None:
        self._inner.admit(peer_id, secret)

    def expel(self, peer_id: str) -> None:
        self._inner.expel(peer_id)

    def connect(self, peer_id: str, offer: TransportOffer, my_id: str, secret: bytes, deadline_s: float) -> Connection:
        inner = self._inner.connect(peer_id, offer, my_id, secret, deadline_s)
        self._connections[inner] = FaultyConnection(self, inner)
        return self._connections[inner]

    def fileno(self) -> int:
        return self._ready.fileno()

    def poll(self) -> list[Event]:
        events = [self._distort(event) for event in self._inner.poll()]
        return [event for event in events if event is not None] + self._events.drain()

    def close(self) -> None:
        for timer in list(self._timers):
            timer.cancel()
            timer.join()
        self._inner.close()
        self._events.close()
        self._ready.close()

    def pull(self, connection: Connection, transfer_id: int, copies: Copies, deadline_s: float) -> None:
        rule = self._rule(self._num_pulls)
        self._num_pulls += 1
        if rule is not None and rule.fault == Fault.DROP:
            self._later(deadline_s, PullFailed(transfer_id, "dropped"))
            return
        if rule is not None:
            self._struck[transfer_id] = Struck(rule, connection, copies)
        connection.pull(transfer_id, copies, deadline_s)
        if rule is not None and rule.fault == Fault.CUT:
            connection.close()

    def _rule(self, number: int) -> Rule | None:
        return next((rule for rule in self._rules if rule.first <= number < rule.first + rule.count), None)

    def _distort(self, event: Event) -> Event | None:
        """What becomes of an event of the inner endpoint; None when it comes later."""
        match event:
            case Connected(connection, speed):
                return Connected(self._connections[connection], speed)
            case ConnectionLost(connection, reason):
                return ConnectionLost(self._connections.pop(connection), reason)
            case Pulled(transfer_id) | PullFailed(transfer_id) if transfer_id in self._struck:
                return self._strike(event, self._struck.pop(transfer_id))
        return event

    def _strike(self, event: Event, struck: Struck) -> Event | None:
        match struck.rule.fault:
            case Fault.DELAY:
                self._later(struck.rule.delay_s, event)
                return None
            case Fault.CORRUPT if isinstance(event, Pulled):
                np.frombuffer(self._region.buffer, np.uint8)[struck.copies[:, 1]] ^= 0xFF
            case Fault.CUT:  # the pulls before it have failed by now
                self._events.push(ConnectionLost(self._connections.pop(struck.connection), "cut"))
        return event

    def _later(self, delay_s: float, event: Event) -> None:
        timer = threading.Timer(delay_s, self._events.push, [event])
        timer.daemon = True
        self._timers = {timer for timer in self._timers if timer.is_alive()} | {timer}
        timer.start()


class FaultyConnection:
    """Implements transfer.Connection."""

    def __init__(self, endpoint: FaultyEndpoint, inner: Connection) -> None:
        self.peer_id = inner.peer_id
        self.transport = inner.transport
        self._endpoint = endpoint
        self._inner = inner

    def pull(self, transfer_id: int, copies: Copies, deadline_s: float) -> None:
        self._endpoint.pull(self._inner, transfer_id, copies, deadline_s)

    def close(self) -> None:
        self._inner.close()
