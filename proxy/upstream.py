"""Connections to one engine: kept open, reused, bounded, and given up when they fall silent.

A request takes an idle connection or opens one. Engines may close an idle connection at the very moment that we write
to it: such a request goes out once more, on a fresh connection, as long as no byte of a reply has come.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections import deque
from dataclasses import dataclass
from urllib.parse import urlsplit

from engine.api.errors import InvalidRequest, Overloaded
from proxy.exchange import Exchange, Loss, UpstreamFailed
from proxy.http1 import BadReply

_IDLE_SECONDS = 30.0  # shorter than servers keep theirs (aiohttp 75 s, uvicorn 5 s: those are met by the fresh attempt)
_CONNECTING = 32  # at once to one engine: a burst must not overflow its backlog
_CALL_BYTES = 4 << 20  # longest answer to a call of our own


@dataclass(frozen=True, slots=True)
class UpstreamLimits:
    connect_s: float = 2.0
    first_byte_s: float = 600.0
    idle_s: float = 120.0  # between two bytes
    max_idle: int = 256  # connections
    max_connections: int = 2048


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole reply to a call of our own."""

    status: int
    body: bytes


class Connection(asyncio.Protocol):
    """One socket; at most one exchange at a time."""

    __slots__ = ("exchange", "heard", "heard_at", "idle_since", "quiet_since", "reused", "transport", "upstream")
    transport: asyncio.Transport

    def __init__(self, upstream: Upstream) -> None:
        self.upstream = upstream
        self.exchange: Exchange | None = None
        self.reused = False
        self.heard = False  # since the last sweep
        self.heard_at = 0.0  # before it
        self.quiet_since = 0.0
        self.idle_since = upstream.now()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]
        self.upstream.open.add(self)

    def data_received(self, data: bytes) -> None:
        self.heard = True
        exchange = self.exchange
        if exchange is None:
            self.transport.abort()  # nobody asked for this
            return
        try:
            exchange.receive(data)
        except BadReply as error:
            self._break_off(Loss.MALFORMED, f"sent a reply that is not HTTP: {error}")

    def connection_lost(self, exc: Exception | None) -> None:
        self.upstream.forget(self)
        if self.exchange is not None:
            exchange, self.exchange = self.exchange, None
            exchange.lost(Loss.RESET, "closed the connection before its reply was complete", orderly=exc is None)

    def attach(self, exchange: Exchange) -> None:
        self.exchange, exchange.connection = exchange, self
        self.heard, self.quiet_since = False, self.upstream.now()
        exchange.sent = True
        self.transport.writelines(exchange.request)

    def release(self, keep: bool) -> None:
        """The exchange is over. An engine that answered before it had the whole request may never take the rest."""
        self.exchange = None
        if keep and not self.transport.is_closing() and not self.transport.get_write_buffer_size():
            self.upstream.keep(self)
        else:
            self.transport.abort()

    def resume(self) -> None:
        """The client takes more: silence counts again, from now."""
        self.quiet_since = self.upstream.now()
        self.transport.resume_reading()

    def sweep(self, now: float) -> None:
        """Notices silence, to the accuracy of the interval at which this is called."""
        if self.heard:
            self.heard, self.heard_at, self.quiet_since = False, now, now
        exchange = self.exchange
        if exchange is None:
            if now - self.idle_since > _IDLE_SECONDS:
                self.transport.close()
        elif not exchange.paused and now - self.quiet_since > self._patience(exchange):
            self._break_off(Loss.TIMEOUT, f"was silent for {self._patience(exchange):g} s")

    def _patience(self, exchange: Exchange) -> float:
        limits = self.upstream.limits
        return limits.idle_s if exchange.head is not None and exchange.first_byte_at else limits.first_byte_s

    def _break_off(self, loss: Loss, reason: str) -> None:
        exchange, self.exchange = self.exchange, None
        self.transport.abort()
        if exchange is not None:
            exchange.lost(loss, reason)


class Upstream:
    """All connections to one engine."""

    def __init__(self, url: str, key: str | None, limits: UpstreamLimits) -> None:
        """`key` is shown to the engine with every request of our own. Raises InvalidRequest for an unusable URL."""
        self.url, self.limits = url, limits
        self.host, self.port, self.base, tls = split_url(url)
        host = f"[{self.host}]" if ":" in self.host else self.host
        self.host_line = f"Host: {host}:{self.port}\r\n".encode()
        self.key_line = f"Authorization: Bearer {key}\r\n".encode() if key else b""
        self.open: set[Connection] = set()
        self._tls = ssl.create_default_context() if tls else None
        self._idle: deque[Connection] = deque()
        self._connecting: dict[asyncio.Task[None], Exchange] = {}
        self._pending: deque[Exchange] = deque()  # for a connection that opens, or becomes free
        self._closed = False
        self._loop = asyncio.get_running_loop()
        self.now = time.monotonic  # not the loop's time, which uvloop rounds to milliseconds

    def begin(self, method: str, path: str, headers: bytes, body: bytes) -> Exchange:
        """Sends a request; `headers` are whole lines. Never blocks and fails only through the Exchange, but for
        Overloaded when there are too many connections."""
        exchange = self._exchange(method, path, headers, body)
        if not self._reuse(exchange):
            if len(self.open) + len(self._connecting) + len(self._pending) >= self.limits.max_connections:
                raise Overloaded(f"{self.url} has {self.limits.max_connections} requests under way")
            self.connect(exchange)
        return exchange

    def _exchange(self, method: str, path: str, headers: bytes, body: bytes) -> Exchange:
        head = f"{method} {self.base}{path} HTTP/1.1\r\n".encode() + self.host_line + headers
        if body or method != "GET":
            head += b"Content-Length: %d\r\n" % len(body)
        return Exchange(self, [head + b"\r\n", body] if body else [head + b"\r\n"], self.now())

    def _reuse(self, exchange: Exchange) -> bool:
        while self._idle:
            connection = self._idle.pop()  # the most recently used: the others may expire
            if not connection.transport.is_closing():
                connection.reused = True
                connection.attach(exchange)
                return True
        return False

    async def call(self, method: str, path: str, body: bytes = b"", *, timeout_s: float) -> Answer:
        """A request of our own with a short answer, however many others are under way. Raises UpstreamFailed."""
        headers = self.key_line + (b"Content-Type: application/json\r\n" if body else b"")
        exchange = self._exchange(method, path, headers, body)
        try:
            if not self._reuse(exchange):
                self.connect(exchange)
            async with asyncio.timeout(timeout_s):
                content = await exchange.read(_CALL_BYTES)
        except TimeoutError:
            raise UpstreamFailed(Loss.TIMEOUT, f"{self.url}{path} did not answer within {timeout_s:g} s") from None
        finally:
            exchange.close()
        assert exchange.head is not None
        return Answer(exchange.head.status, content)

    def connect(self, exchange: Exchange) -> None:
        """Finds a connection for `exchange`: one that it opens, or one that becomes free before."""
        if self._closed:
            exchange.fail(self._gone())
            return
        if len(self._connecting) >= _CONNECTING:
            self._pending.append(exchange)
            return
        task = self._loop.create_task(self._connect(exchange))
        exchange.connecting = task
        self._connecting[task] = exchange
        task.add_done_callback(self._connected)

    def _connected(self, task: asyncio.Task[None]) -> None:
        del self._connecting[task]
        exchange = self._next_pending()
        if exchange is not None:
            self.connect(exchange)

    def _next_pending(self) -> Exchange | None:
        while self._pending:
            exchange = self._pending.popleft()
            if exchange.error is None:
                return exchange
        return None

    async def _connect(self, exchange: Exchange) -> None:
        try:
            async with asyncio.timeout(self.limits.connect_s):
                _, connection = await self._loop.create_connection(
                    lambda: Connection(self), self.host, self.port, ssl=self._tls
                )
        except (
            OSError,
            UnicodeError,
        ) as error:  # TimeoutError is an OSError; UnicodeError: no name that can be looked up
            exchange.connecting = None
            loss = Loss.REFUSED if isinstance(error, ConnectionRefusedError) else Loss.UNREACHABLE
            for unconnected in (exchange, *self._pending):
                unconnected.fail(UpstreamFailed(loss, f"{self.url} cannot be reached: {str(error) or 'no answer'}"))
        else:
            exchange.connecting = None
            connection.attach(exchange)

    def keep(self, connection: Connection) -> None:
        pending = self._next_pending()
        if pending is not None:
            connection.reused = True
            connection.attach(pending)
        elif len(self._idle) >= self.limits.max_idle:
            connection.transport.close()
        else:
            connection.idle_since = self.now()
            self._idle.append(connection)

    def forget(self, connection: Connection) -> None:
        self.open.discard(connection)
        if connection.exchange is None and connection in self._idle:
            self._idle.remove(connection)

    def under_way(self) -> list[Exchange]:
        """Those that have not ended, with or without a connection."""
        attached = [connection.exchange for connection in self.open if connection.exchange is not None]
        unconnected = [exchange for exchange in (*self._connecting.values(), *self._pending) if exchange.error is None]
        return attached + unconnected

    def heard_since(self, moment: float) -> bool:
        """Whether any byte came from this engine since (monotonic)."""
        return any(connection.heard or connection.heard_at > moment for connection in self.open if connection.exchange)

    def fail_unstarted(self, reason: str) -> None:
        """The node is dead or hung: whoever still waits for a first byte may go elsewhere."""
        for exchange in self.under_way():
            if not exchange.first_byte_at:
                exchange.fail(UpstreamFailed(Loss.NODE_OUT, f"{self.url} {reason}"))

    def sweep(self) -> None:
        now = self.now()
        for connection in list(self.open):
            connection.sweep(now)

    def close(self) -> None:
        """Ends whatever is under way, and whatever is begun later."""
        self._closed = True
        for exchange in self.under_way():
            exchange.fail(self._gone())
        for connection in list(self.open):
            connection.transport.abort()

    def _gone(self) -> UpstreamFailed:
        return UpstreamFailed(Loss.NODE_OUT, f"{self.url} is registered no more")


def split_url(url: str) -> tuple[str, int, str, bool]:
    """(host, port, path prefix, TLS) of an engine's URL. Raises InvalidRequest."""
    try:
        parts = urlsplit(url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError as error:
        raise InvalidRequest(f"{url!r} is not a URL: {error}", param="url") from None
    usable = parts.scheme in ("http", "https") and parts.hostname and not parts.query and not parts.fragment
    if not usable or parts.username is not None or not url.isascii() or any(c.isspace() or c < " " for c in url):
        raise InvalidRequest(f"{url!r} is not a URL like http://10.0.0.1:23333", param="url")
    return str(parts.hostname), port, parts.path.rstrip("/"), parts.scheme == "https"
