"""An endpoint whose peers come over sockets: a reactor, a gate for readers, and connections of our own."""

from __future__ import annotations

import socket
from abc import ABC, abstractmethod

from kvtransfer.copies import CopyRanges
from kvtransfer.events import EventQueue
from kvtransfer.gate import Gate
from kvtransfer.handshake import check_id
from kvtransfer.memory import Region
from kvtransfer.offer import TransportOffer
from kvtransfer.reactor import Reactor
from kvtransfer.reader import ReadingConnection, Target
from kvtransfer.transfer import Connection, Event


class SocketEndpoint(ABC):
    """Implements transfer.Endpoint over the subclass's listener, connections and way to serve a reader."""

    transport: str

    def __init__(
        self,
        region: Region,
        host_id: str,
        copy: CopyRanges,
        listener: socket.socket,
        connection: type[ReadingConnection],
    ) -> None:
        listener.setblocking(False)
        self._region = region
        self._host_id = host_id
        self._copy = copy
        self._connection = connection
        self._events = EventQueue()
        self._reactor = Reactor(f"kvtransfer-{self.transport}")
        self._gate = Gate(self.transport, listener, self._reactor, self._events, self._serve)
        self._reactor.call(self._gate.open)

    @abstractmethod
    def offer(self) -> TransportOffer: ...

    @abstractmethod
    async def _serve(self, sock: socket.socket, proof: bytes) -> None:
        """Answers with the proof, then serves one reader. See gate.Gate."""

    def admit(self, peer_id: str, secret: bytes) -> None:
        check_id(peer_id)
        self._reactor.call(self._gate.admit, peer_id, secret)

    def expel(self, peer_id: str) -> None:
        self._reactor.call(self._gate.expel, peer_id)

    def connect(self, peer_id: str, offer: TransportOffer, my_id: str, secret: bytes, deadline_s: float) -> Connection:
        target = Target(peer_id, offer, my_id, secret, deadline_s)
        connection = self._connection(target, self._region, self._copy, self._reactor, self._events)
        connection.start()
        return connection

    def fileno(self) -> int:
        return self._events.fileno()

    def poll(self) -> list[Event]:
        return self._events.drain()

    def close(self) -> None:
        """Idempotent. `poll` still returns the events that closing caused."""
        self._reactor.close()
        self._events.close()

    def _offer(self, address: dict[str, str | int]) -> TransportOffer:
        return TransportOffer(
            transport=self.transport, host_id=self._host_id, address=address, pool_bytes=self._region.num_bytes
        )
