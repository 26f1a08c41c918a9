"""Passes an engine's answer on to the client, byte for byte, and ends it truthfully when the engine does not.

The client's transport is written to directly; aiohttp is told, with one of two constant responses, that the answer has
been given.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Final

import msgspec
from aiohttp import HttpVersion11, web
from aiohttp.abc import AbstractStreamWriter

from engine.api.errors import TandemError, openai_body
from proxy.exchange import Exchange, UpstreamFailed
from proxy.http1 import Chunked, ReplyHead, Sized
from proxy.metrics import Metrics

MAX_BUFFERED_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class BufferedReply:
    """A whole reply of an engine, kept because it may be the answer after all."""

    head: ReplyHead
    body: bytes


@dataclass(frozen=True, slots=True)
class Outcome:
    response: web.StreamResponse
    status: int  # the answer's
    whole: bool  # the client has all of it


class _Given(web.StreamResponse):
    """Stands for an answer that has been written already. Holds no state, so that one serves every request."""

    def __init__(self, keep_alive: bool) -> None:
        super().__init__()
        self._keep_alive = keep_alive

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        return None

    async def write_eof(self, data: bytes = b"") -> None:
        return None


_KEEP: Final = _Given(True)
_CLOSE: Final = _Given(False)
ABANDONED: Final[web.StreamResponse] = _CLOSE  # for a client that has left: there is nobody to answer


async def buffer(exchange: Exchange) -> BufferedReply:
    """Raises UpstreamFailed."""
    body = await exchange.read(MAX_BUFFERED_BYTES)
    assert exchange.head is not None
    return BufferedReply(exchange.head, body)


def give(request: web.Request, reply: BufferedReply) -> Outcome:
    transport = _transport(request)
    transport.write(_head_lines(request, reply.head, f"Content-Length: {len(reply.body)}\r\n".encode()) + reply.body)
    return Outcome(_KEEP if request.keep_alive else _CLOSE, reply.head.status, True)


async def relay(request: web.Request, exchange: Exchange, metrics: Metrics, patience_s: float) -> Outcome:
    """After `exchange.reply()`. A client that takes nothing for `patience_s` seconds is left."""
    transport, head = _transport(request), exchange.head
    assert head is not None
    framing = head.framing
    modern = request.version >= HttpVersion11
    if isinstance(framing, Chunked) and modern:
        length_line = b"Transfer-Encoding: chunked\r\n"
    else:
        length_line = b"Content-Length: %d\r\n" % _length(head) if isinstance(framing, Sized) else b""
    keep_alive = request.keep_alive and bool(length_line)
    unframed = isinstance(framing, Chunked) and not modern
    write = (lambda passed: transport.write(framing.payload(passed))) if unframed else transport.write
    early = exchange.relay_to(request.protocol, write)
    head_lines = _head_lines(request, head, length_line, keep_alive)
    transport.write(head_lines + (framing.payload(early) if unframed else early))
    try:
        await _until_whole(request, exchange, patience_s)
    except UpstreamFailed as error:
        metrics.cut_answers += 1
        _end_cut(transport, head, error, chunked=not unframed and isinstance(framing, Chunked))
        return Outcome(_CLOSE, head.status, False)
    except BaseException:
        transport.abort()  # the head is out: nothing but a broken connection would be true now
        raise
    finally:
        metrics.relayed_bytes += exchange.relayed_bytes
    return Outcome(_KEEP if keep_alive else _CLOSE, head.status, True)


async def _until_whole(request: web.Request, exchange: Exchange, patience_s: float) -> None:
    while not await exchange.relayed():
        await until_taken(request, patience_s)
        exchange.resume()


async def until_taken(request: web.Request, patience_s: float) -> None:
    """Until the client has taken so much that more may be written. Raises ConnectionResetError after `patience_s`."""
    if not request.protocol.writing_paused:
        return
    try:
        async with asyncio.timeout(patience_s):
            await request.writer.drain()
    except TimeoutError:
        _transport(request).abort()
        raise ConnectionResetError("the client takes nothing") from None


def _end_cut(transport: asyncio.Transport, head: ReplyHead, error: TandemError, chunked: bool) -> None:
    """A stream ends with an error event; anything else must not look like an answer."""
    if not head.event_stream or head.framing.broken_off:
        transport.abort()
        return
    event = b"\n\ndata: " + msgspec.json.encode(openai_body(error)) + b"\n\n"
    transport.write(b"%x\r\n%b\r\n0\r\n\r\n" % (len(event), event) if chunked else event)


def _head_lines(request: web.Request, head: ReplyHead, length_line: bytes, keep_alive: bool = True) -> bytes:
    connection = b"" if keep_alive and request.keep_alive else b"Connection: close\r\n"
    status = b"HTTP/1.1 %d %b\r\n" % (head.status, head.reason)
    return status + head.passed_headers + length_line + connection + b"\r\n"


def _length(head: ReplyHead) -> int:
    return int(head.headers.get(b"content-length", b"0"))


def _transport(request: web.Request) -> asyncio.Transport:
    """Raises ConnectionResetError when the client has left."""
    if request.transport is None:
        raise ConnectionResetError("the client has left")
    return request.transport
