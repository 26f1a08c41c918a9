"""Connections to an engine, over real sockets: whatever happens to them, whoever waits is told."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress

import pytest

from engine.api.distserve import Status
from proxy.exchange import Exchange, Loss, UpstreamFailed
from proxy.health import Prober
from proxy.nodes import NodeTable
from proxy.upstream import Upstream, UpstreamLimits

DEADLINE_S = 5.0

Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def engine(answer: Answer) -> AsyncIterator[str]:
    """The URL of a listener that lets `answer` deal with every connection."""
    writers: list[asyncio.StreamWriter] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        with suppress(ConnectionError, asyncio.CancelledError):
            await answer(reader, writer)

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for writer in writers:
            writer.transport.abort()


@pytest.fixture
def nowhere() -> Iterator[str]:
    """The URL of a listener with a full backlog: the kernel answers no connection to it."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener, socket.socket() as first:
        first.connect(listener.getsockname())
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


async def mute(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """As a stopped process: connections are taken, nothing is said."""
    await reader.read(-1)


async def outcome(exchange: Exchange) -> Loss:
    with pytest.raises(UpstreamFailed) as failed:
        await asyncio.wait_for(exchange.reply(), DEADLINE_S)
    return failed.value.loss


async def test_what_is_still_connecting_keeps_its_removed_engine_until_it_knows(nowhere: str) -> None:
    table = NodeTable("random", lambda url: Upstream(url, None, UpstreamLimits(connect_s=0.2)))
    node = table.add(nowhere, Status(models=["m"]))
    exchange = node.upstream.begin("POST", "/v1/completions", b"", b"{}")
    await asyncio.sleep(0)
    table.remove(nowhere)
    table.sweep()
    assert await outcome(exchange) is Loss.UNREACHABLE


async def test_closing_tells_whoever_still_waits_for_a_connection(nowhere: str) -> None:
    upstream = Upstream(nowhere, None, UpstreamLimits(connect_s=60.0))
    exchanges = [upstream.begin("GET", "/", b"", b"") for _ in range(40)]  # more than connect at once
    await asyncio.sleep(0)
    upstream.close()
    exchanges.append(upstream.begin("GET", "/", b"", b""))
    assert {await outcome(exchange) for exchange in exchanges} == {Loss.NODE_OUT}


async def test_a_host_that_cannot_be_looked_up_is_unreachable() -> None:
    upstream = Upstream("http://nobody..home:1", None, UpstreamLimits())
    exchange = upstream.begin("GET", "/", b"", b"")
    assert await outcome(exchange) is Loss.UNREACHABLE
    assert exchange.error is not None
    assert not exchange.error.message.endswith(": ")


async def test_new_requests_to_a_hung_engine_are_no_sign_of_life() -> None:
    async with engine(mute) as url:
        table = NodeTable("random", lambda url: Upstream(url, None, UpstreamLimits()))
        node = table.add(url, Status(models=["m"]))
        prober = Prober(table, interval_s=0.05, timeout_s=0.2, ttl_s=60.0)
        prober.follow()
        exchanges = []
        async with asyncio.timeout(DEADLINE_S):
            while node.up:
                exchanges.append(node.upstream.begin("POST", "/v1/completions", b"", b"{}"))
                table.sweep()
                await asyncio.sleep(0.02)
        assert {await outcome(exchange) for exchange in exchanges} == {Loss.NODE_OUT}
        prober.close()
        table.close()


async def test_an_engine_with_all_its_connections_in_use_is_probed_all_the_same() -> None:
    async with engine(mute) as url:
        table = NodeTable("random", lambda url: Upstream(url, None, UpstreamLimits(max_connections=1)))
        node = table.add(url, Status(models=["m"]))
        node.upstream.begin("POST", "/v1/completions", b"", b"{}")
        prober = Prober(table, interval_s=0.05, timeout_s=0.1, ttl_s=60.0)
        prober.follow()
        async with asyncio.timeout(DEADLINE_S):
            while node.up:  # noqa: ASYNC110 (nothing tells)
                await asyncio.sleep(0.02)
        prober.close()
        table.close()


async def test_a_connection_whose_request_was_not_taken_is_not_used_again() -> None:
    accepted = 0

    async def hasty(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answers from the head alone, and never reads the body."""
        nonlocal accepted
        accepted += 1
        await reader.readuntil(b"\r\n\r\n")
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        writer.write(b"HTTP/1.1 413 No\r\nContent-Length: 2\r\n\r\nNo")
        await asyncio.sleep(60)

    async with engine(hasty) as url:
        upstream = Upstream(url, None, UpstreamLimits())
        exchange = upstream.begin("POST", "/", b"", bytes(16 << 20))
        assert await asyncio.wait_for(exchange.read(100), DEADLINE_S) == b"No"
        following = upstream.begin("GET", "/", b"", b"")
        assert await asyncio.wait_for(following.read(100), DEADLINE_S) == b"No"
        assert accepted == 2
        upstream.close()


async def test_silence_is_counted_from_when_the_client_takes_more() -> None:
    async def streams(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n" + bytes(1 << 20))
        await reader.read(-1)

    async with engine(streams) as url:
        upstream = Upstream(url, None, UpstreamLimits(idle_s=30.0))
        clock = upstream.now()
        upstream.now = lambda: clock  # type: ignore[method-assign]
        exchange = upstream.begin("GET", "/", b"", b"")
        async with asyncio.timeout(DEADLINE_S):
            while not exchange.paused:  # noqa: ASYNC110 (nothing tells)
                await asyncio.sleep(0.01)
        upstream.sweep()
        clock += 29.0
        upstream.sweep()
        exchange.resume()
        clock += 2.0
        upstream.sweep()
        assert exchange.error is None
        upstream.close()
