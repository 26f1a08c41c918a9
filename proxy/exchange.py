"""One request to an engine and its reply: from the first byte written to the last byte passed on.

    begin ─▶ (connecting) ─▶ sent ─▶ head and first body bytes ─▶ read() or relay_to() ─▶ finished
                  └──────────────┴──────────────── failed ─────────────────┘

Between two wake-ups of the one coroutine that waits here everything happens in callbacks: a chunk costs one `feed` and
one `write`, no task, no lock.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from enum import StrEnum
from typing import TYPE_CHECKING, Protocol

from engine.api.errors import TandemError
from proxy.http1 import MAX_HEAD_BYTES, BadReply, ReplyHead, parse_head

if TYPE_CHECKING:
    from proxy.upstream import Connection, Upstream

_EARLY_BYTES = 256 << 10  # body bytes taken before anyone asks for them


class Loss(StrEnum):
    """How an exchange can fail; the label of the metric."""

    REFUSED = "refused"  # nobody listens there
    UNREACHABLE = "unreachable"  # the connection was not answered
    RESET = "reset"  # the connection ended before the reply did
    TIMEOUT = "timeout"
    MALFORMED = "malformed"  # not HTTP
    TOO_LONG = "too_long"  # a body that we wanted whole is longer than we take
    NODE_OUT = "node_out"  # the node was found dead or hung meanwhile


class UpstreamFailed(TandemError):
    """No (whole) reply came from an engine."""

    status = 502
    label = "upstream"

    def __init__(self, loss: Loss, message: str) -> None:
        super().__init__(message, code="upstream_" + loss)
        self.loss = loss
        if loss is Loss.TIMEOUT:
            self.status = 504


class Client(Protocol):
    """The client's connection, as a relay sees it: aiohttp's protocol object."""

    @property
    def writing_paused(self) -> bool: ...


class Exchange:
    """Made by `Upstream.begin`. One coroutine at a time waits on it; `close` whenever it is no longer wanted."""

    __slots__ = (
        "_client",
        "_early",
        "_raw",
        "_waiter",
        "_write",
        "connecting",
        "connection",
        "error",
        "finished",
        "first_byte_at",
        "head",
        "paused",
        "receive",
        "relayed_bytes",
        "request",
        "sent",
        "started_at",
        "upstream",
    )

    def __init__(self, upstream: Upstream, request: list[bytes], now: float) -> None:
        self.upstream = upstream
        self.request = request
        self.started_at = now  # monotonic, seconds
        self.first_byte_at = 0.0  # of the body
        self.connection: Connection | None = None
        self.connecting: asyncio.Task[None] | None = None
        self.head: ReplyHead | None = None
        self.error: TandemError | None = None
        self.sent = False  # to some connection: the engine may have seen it
        self.finished = False  # the reply is whole
        self.paused = False  # the client is slower than the engine
        self.relayed_bytes = 0
        self.receive: Callable[[bytes], None] = self._receive_head
        self._raw = b""
        self._early: list[bytes] = []
        self._waiter: asyncio.Future[None] | None = None
        self._client: Client | None = None
        self._write: Callable[[bytes], None] | None = None

    # what the coroutine asks

    async def reply(self) -> ReplyHead:
        """Waits for the head and the first bytes of the body, so that a status is only passed on when an answer stands
        behind it. Raises UpstreamFailed."""
        while self.error is None and not self._early and not self.finished:
            await self._wait()
        if self.error is not None:
            raise self.error
        assert self.head is not None
        return self.head

    async def read(self, limit: int) -> bytes:
        """The whole body, unframed. Raises UpstreamFailed, also when it is longer than `limit` bytes."""
        head = await self.reply()
        parts: list[bytes] = []
        size = 0
        while True:
            for passed in self._take_early():
                parts.append(head.framing.payload(passed))
                size += len(passed)
            if size > limit:
                self.fail(UpstreamFailed(Loss.TOO_LONG, f"{self.upstream.url} answered with more than {limit} bytes"))
            if self.error is not None:
                raise self.error
            if self.finished:
                return b"".join(parts)
            await self._wait()

    def relay_to(self, client: Client, write: Callable[[bytes], None]) -> bytes:
        """From now on body bytes go to `write` as they come; `relayed` waits for the end. Returns those that have come
        already, to be written first (with the head, in one system call). After `reply` only."""
        self._client, self._write = client, write
        self.receive = self._receive_relayed
        early = b"".join(self._take_early())
        self.relayed_bytes += len(early)
        return early

    async def relayed(self) -> bool:
        """True when all is written, False when the client must drain first (then `resume`). Raises UpstreamFailed."""
        while self.error is None and not self.finished and not self.paused:
            await self._wait()
        if self.error is not None:
            raise self.error
        return self.finished

    def resume(self) -> None:
        self.paused = False
        if self.connection is not None:
            self.connection.resume()

    def fail(self, error: TandemError) -> None:
        """Ends it with `error` for whoever waits; the connection is closed, which is how the engine learns."""
        if self.error is None and not self.finished:
            self.error = error
            self._leave()
            self._wake()

    def close(self) -> None:
        """No longer wanted. Idempotent, and nothing for a finished one."""
        self.fail(UpstreamFailed(Loss.RESET, "closed by the proxy"))

    # what the connection says

    def lost(self, loss: Loss, reason: str, orderly: bool = False) -> None:
        """The connection has ended; `orderly` when by the engine's own choice."""
        connection, self.connection = self.connection, None
        if self.finished or self.error is not None:
            return
        if orderly and self.head is not None and self.head.framing.ends():
            self._finish()
        elif connection is not None and connection.reused and loss is Loss.RESET and not self.head and not self._raw:
            self.upstream.connect(self)  # kept open too long by us: the engine had closed it before it saw this request
        else:
            self.fail(UpstreamFailed(loss, f"{self.upstream.url} {reason}"))

    def _receive_head(self, data: bytes) -> None:
        self._raw += data
        while self.head is None:
            end = self._raw.find(b"\r\n\r\n")
            if end > MAX_HEAD_BYTES or (end < 0 and len(self._raw) > MAX_HEAD_BYTES):
                raise BadReply("its headers are too long")
            if end < 0:
                return
            head, self._raw = parse_head(self._raw[:end]), self._raw[end + 4 :]
            if head.status >= 200:  # what comes before are interim replies
                self.head = head
        self.receive = self._receive_early
        self._receive_early(self._raw)

    def _receive_early(self, data: bytes) -> None:
        assert self.head is not None
        passed = self._feed(data)
        if passed:
            self.first_byte_at = self.first_byte_at or self.upstream.now()
            self._early.append(passed)
            if sum(map(len, self._early)) > _EARLY_BYTES:
                self._pause()
        if self.head.framing.done:
            self._finish()
        self._wake()

    def _receive_relayed(self, data: bytes) -> None:
        passed = self._feed(data)
        self.relayed_bytes += len(passed)
        self._write(passed)  # type: ignore[misc]
        if self.head.framing.done:  # type: ignore[union-attr]
            self._finish()
            self._wake()
        elif self._client.writing_paused:  # type: ignore[union-attr]
            self._pause()
            self._wake()

    # inside

    def _feed(self, data: bytes) -> bytes:
        return self.head.framing.feed(data)  # type: ignore[union-attr]

    def _take_early(self) -> list[bytes]:
        early, self._early = self._early, []
        if self.paused:
            self.resume()
        return early

    def _pause(self) -> None:
        if self.connection is not None and not self.paused:
            self.paused = True
            self.connection.transport.pause_reading()

    def _finish(self) -> None:
        self.finished = True
        self._leave()
        self._wake()

    def _leave(self) -> None:
        """Gives the connection back, to be kept only after a whole reply."""
        if self.connecting is not None:
            self.connecting.cancel()
            self.connecting = None
        connection, self.connection = self.connection, None
        if connection is not None:
            head = self.head
            whole = self.finished and head is not None and head.keep_alive and not head.framing.surplus
            connection.release(keep=whole and not self.paused)

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    async def _wait(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None
