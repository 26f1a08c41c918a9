"""The owner's door: listens, lets in whoever proves an admitted secret, and keeps one connection for each peer."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable

from kvtransfer.events import EventQueue
from kvtransfer.handshake import HandshakeError, examine
from kvtransfer.reactor import Reactor
from kvtransfer.transfer import ReaderLost

MAX_HANDSHAKES = 16  # at once; more wait in the kernel's bounded backlog
HANDSHAKE_S = 2.0
ACCEPT_RETRY_S = 0.1

Serve = Callable[[socket.socket, bytes], Awaitable[None]]  # the socket, the proof to answer with

log = logging.getLogger(__name__)


class Gate:
    """Everything but the constructor belongs to the reactor's thread.

    `serve` answers with the proof and then serves one reader until it ends, by returning or by OSError, EOFError,
    ValueError or TimeoutError.
    """

    def __init__(self, transport: str, listener: socket.socket, reactor: Reactor, events: EventQueue, serve: Serve):
        self._transport = transport
        self._listener = listener
        self._reactor = reactor
        self._events = events
        self._serve = serve
        self._admitted: dict[str, bytes] = {}
        self._serving: dict[str, asyncio.Task[None]] = {}

    def admit(self, peer_id: str, secret: bytes) -> None:
        self._admitted[peer_id] = secret

    def expel(self, peer_id: str) -> None:
        self._admitted.pop(peer_id, None)
        if task := self._serving.pop(peer_id, None):
            task.cancel()

    def open(self) -> None:
        self._reactor.start(self._accept(), lambda _: self._listener.close())

    async def _accept(self) -> None:
        slots = asyncio.Semaphore(MAX_HANDSHAKES)
        while True:
            await slots.acquire()
            sock = await self._accept_one()
            self._reactor.start(self._welcome(sock, slots), _closes(sock))

    async def _accept_one(self) -> socket.socket:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, _ = await loop.sock_accept(self._listener)
                return sock
            except OSError as error:  # out of descriptors, or a peer that is gone already
                log.warning("%s: cannot accept: %s", self._transport, error)
                await asyncio.sleep(ACCEPT_RETRY_S)

    async def _welcome(self, sock: socket.socket, slots: asyncio.Semaphore) -> None:
        try:
            async with asyncio.timeout(HANDSHAKE_S):
                peer_id, proof = await examine(sock, self._transport, self._admitted)
        except (HandshakeError, OSError, EOFError, TimeoutError) as error:
            log.warning("%s: refused a connection: %s", self._transport, error or "no handshake in time")
            return
        finally:
            slots.release()
        await self._keep(peer_id, sock, proof)

    async def _keep(self, peer_id: str, sock: socket.socket, proof: bytes) -> None:
        """Serves the peer in place of an older connection of its own, which it must have given up."""
        task = asyncio.current_task()
        assert task is not None
        if older := self._serving.get(peer_id):
            older.cancel()
        self._serving[peer_id] = task
        try:
            await self._serve(sock, proof)
        except (OSError, EOFError, ValueError, TimeoutError) as error:
            log.info("%s: reader %s: %s", self._transport, peer_id, error or "stalled")
        finally:
            if self._serving.get(peer_id) is task:  # neither expelled nor replaced
                del self._serving[peer_id]
                self._events.push(ReaderLost(peer_id))


def _closes(sock: socket.socket) -> Callable[[asyncio.Task[None]], None]:
    return lambda _: sock.close()
