"""What a request and a relayed chunk cost the proxy, beside a plain aiohttp relay in the same run.

    python -m tests.bench.proxy [--seconds 4] [--rounds 3]

One process each for the load, the router under test and an engine stand-in that answers at once and computes nothing.
The cost is the router's own CPU time, so that a busy machine disturbs it little; the best round counts.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import uvloop
from aiohttp import web

from tests.bench.report import machine, table

PATH = "/v1/completions"
CONNECTIONS = 32
CHUNKS_PER_STREAM = {64: 400, 512: 60}
TICK_S = {64: 0.008, 512: 0.05}  # about ten thousand chunks a second
PADDING = "x" * 100
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


# the engine stand-in


class Engine(asyncio.Protocol):
    """Whole requests in, instant replies out; a stream gets one chunk at each tick."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport
        self.buffer = b""

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while (end := self.buffer.find(b"\r\n\r\n")) >= 0:
            head = self.buffer[:end].lower()
            _, found, rest = head.partition(b"content-length:")
            length = int(rest.split(b"\r\n")[0]) if found else 0
            if len(self.buffer) < end + 4 + length:
                return
            body = self.buffer[end + 4 : end + 4 + length]
            self.buffer = self.buffer[end + 4 + length :]
            self.answer(head.split(b" ", 2)[1].decode(), body)

    def answer(self, path: str, body: bytes) -> None:
        if path == PATH and b'"stream":true' in body:
            request = json.loads(body)
            self.transport.write(
                b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
            )
            _stream(self.transport, request["max_tokens"], request["tick_s"])
        else:
            content = json.dumps(_reply(path)).encode()
            lines = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(content)
            self.transport.write(lines + content)


def _reply(path: str) -> object:
    if path == "/distserve/engine_info":
        return {"block_size": 16, "num_gpu_blocks": 1}
    if path == "/distserve/p2p_initialize":
        info = [{"protocol": 2, "endpoint_info": '{"tandem":1}'}]
        return {"status": 1, "engine_endpoint_info": {"zmq_address": "tcp://x:1"}, "kvtransfer_endpoint_info": info}
    if path == PATH:
        return {"id": "cmpl-1", "object": "text_completion", "choices": [{"index": 0, "text": PADDING}], "usage": {}}
    return {"status": 1, "success": True}


_streams: dict[float, list[list[Any]]] = {}  # by tick: [transport, chunks to come]


def _stream(transport: Any, chunks: int, tick_s: float) -> None:
    streams = _streams.setdefault(tick_s, [])
    streams.append([transport, chunks])
    if len(streams) == 1:
        _tick(tick_s)


def _tick(tick_s: float) -> None:
    event = b'data: {"t":%020d,"choices":[{"index":0,"text":"%b"}]}\n\n' % (time.monotonic_ns(), PADDING.encode())
    chunk = b"%x\r\n%b\r\n" % (len(event), event)
    for stream in _streams[tick_s]:
        stream[1] -= 1
        stream[0].write(chunk if stream[1] else chunk + b"0\r\n\r\n")
    _streams[tick_s] = [stream for stream in _streams[tick_s] if stream[1]]
    if _streams[tick_s]:
        asyncio.get_running_loop().call_later(tick_s, _tick, tick_s)


async def engine() -> None:
    server = await asyncio.get_running_loop().create_server(Engine, "127.0.0.1", 0, backlog=1024)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await server.serve_forever()


# the peer: aiohttp on both sides


async def peer(engines: list[str]) -> None:
    session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), auto_decompress=False)

    async def prefill(body: bytes) -> None:
        async with session.post(engines[0] + PATH, data=body) as reply:
            await reply.read()

    async def complete(request: web.Request) -> web.StreamResponse:
        body = await request.read()
        json.loads(body)
        beside = asyncio.create_task(prefill(body)) if len(engines) > 1 else None
        async with session.post(engines[-1] + PATH, data=body) as reply:
            response = web.StreamResponse(status=reply.status, headers={"Content-Type": reply.headers["Content-Type"]})
            if "Content-Length" in reply.headers:
                response.content_length = int(reply.headers["Content-Length"])
            await response.prepare(request)
            async for data in reply.content.iter_any():
                await response.write(data)
        if beside is not None:
            await beside
        await response.write_eof()
        return response

    app = web.Application()
    app.router.add_post(PATH, complete)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    print(f"http://127.0.0.1:{runner.addresses[0][1]}", flush=True)
    await asyncio.Event().wait()


# the load


@dataclass
class Tally:
    requests: int = 0
    delays_ms: list[float] = field(default_factory=list)  # engine's write to client's read, of one stream in sixteen
    done: asyncio.Event = field(default_factory=asyncio.Event)


class Client(asyncio.Protocol):
    """Asks again as soon as the reply is whole, until the deadline; a stream is asked for once."""

    def __init__(self, request: bytes, tally: Tally, until: float, timed: bool) -> None:
        self.request, self.tally, self.until, self.timed = request, tally, until, timed
        self.buffer = b""
        self.finished = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport
        self.transport.write(self.request)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.finished.done():
            self.finished.set_exception(exc or ConnectionError("the router closed the connection"))

    def data_received(self, data: bytes) -> None:
        if self.timed and (at := data.rfind(b'"t":')) >= 0:
            self.tally.delays_ms.append((time.monotonic_ns() - int(data[at + 4 : at + 24])) / 1e6)
        self.buffer = self.buffer[-8:] + data if self.until == 0.0 else self.buffer + data
        if self.until == 0.0:
            whole = self.buffer.endswith(b"\r\n0\r\n\r\n")
        else:
            end = self.buffer.find(b"\r\n\r\n")
            length = self.buffer.lower().find(b"content-length: ", 0, end)
            whole = end >= 0 and len(self.buffer) == end + 4 + int(self.buffer[length + 16 : end].split(b"\r\n")[0])
        if whole:
            self.next()

    def next(self) -> None:
        assert b" 200 " in self.buffer[:16] or self.until == 0.0, self.buffer
        self.tally.requests += 1
        self.buffer = b""
        if time.monotonic() < self.until:
            self.transport.write(self.request)
        else:
            self.finished.set_result(None)


async def load(url: str, body: dict[str, object], connections: int, seconds: float) -> Tally:
    """`seconds` of requests, or one stream a connection when 0."""
    content = json.dumps(body, separators=(",", ":")).encode()
    lines = (
        f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    until, tally = time.monotonic() + seconds if seconds else 0.0, Tally()
    host, port = url.removeprefix("http://").split(":")
    loop, clients = asyncio.get_running_loop(), []
    for index in range(connections):
        timed = not seconds and index % 16 == 0
        _, client = await loop.create_connection(
            lambda timed=timed: Client(lines.encode() + content, tally, until, timed), host, int(port)
        )
        clients.append(client)
    await asyncio.wait_for(asyncio.gather(*(client.finished for client in clients)), 120)
    for client in clients:
        client.transport.close()
    return tally


# the measurement


@dataclass(frozen=True)
class Router:
    name: str
    url: str
    pid: int

    def cpu_s(self) -> float:
        with open(f"/proc/{self.pid}/stat") as stat:
            fields = stat.read().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / TICKS_PER_S

    def rss_mb(self) -> float:
        with open(f"/proc/{self.pid}/statm") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


@contextlib.contextmanager
def spawned(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process that says its URL on stdout, or, the proxy, in its log."""
    proxy = arguments[0] == "proxy"
    pipe = {"stderr" if proxy else "stdout": subprocess.PIPE}
    module = [sys.executable, "-m", "proxy" if proxy else "tests.bench.proxy", *arguments[proxy:]]
    process = subprocess.Popen(module, text=True, **pipe)  # type: ignore[call-overload]
    try:
        said = (process.stderr if proxy else process.stdout).readline()  # type: ignore[union-attr]
        yield process, said.split()[-1]
    finally:
        process.terminate()
        process.wait(20)


def post(url: str, body: object) -> None:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    urllib.request.urlopen(request, timeout=20).read()


@contextlib.contextmanager
def routers(shared: bool) -> Iterator[list[Router]]:
    """Ours and the peer, each before the same engines: one, or a prefill and a decode engine."""
    with contextlib.ExitStack() as stack:
        engines = [stack.enter_context(spawned("--role", "engine"))[1] for _ in range(2 if shared else 1)]
        ours, url = stack.enter_context(spawned("proxy", "--port", "0", "--max-inflight", "2048"))
        theirs, peer_url = stack.enter_context(spawned("--role", "peer", *engines))
        for role, engine_url in zip((2, 3) if shared else (1,), engines, strict=True):
            post(url + "/nodes/add", {"url": engine_url, "status": {"role": role, "models": ["m"]}})
        post(url + "/distserve/connection_warmup", {})
        yield [Router("proxy", url, ours.pid), Router("aiohttp relay", peer_url, theirs.pid)]


def requests_per_cpu_second(router: Router, seconds: float) -> float:
    before = router.cpu_s()
    tally = uvloop.run(load(router.url, {"model": "m", "prompt": PADDING}, CONNECTIONS, seconds))
    return tally.requests / (router.cpu_s() - before)


def cpu_s_per_million_chunks(router: Router, streams: int) -> tuple[float, float]:
    """And the 99th percentile of a chunk's way from engine to client, in milliseconds."""
    body = {"model": "m", "stream": True, "max_tokens": CHUNKS_PER_STREAM[streams], "tick_s": TICK_S[streams]}
    before = router.cpu_s()
    tally = uvloop.run(load(router.url, body, streams, 0))
    spent = router.cpu_s() - before
    delays = sorted(tally.delays_ms)
    return spent / (streams * CHUNKS_PER_STREAM[streams]) * 1e6, delays[int(len(delays) * 0.99)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--role", choices=("engine", "peer"), help=argparse.SUPPRESS)
    parser.add_argument("engines", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if options.role:
        uvloop.run(engine() if options.role == "engine" else peer(options.engines))
    else:
        measure(options.seconds, options.rounds)


def measure(seconds: float, rounds: int) -> None:
    rows: dict[str, list[str]] = {}
    for shared in (False, True):
        with routers(shared) as under_test:
            for router in under_test:
                best = max(requests_per_cpu_second(router, seconds) for _ in range(rounds))
                rows.setdefault(router.name, []).append(f"{best:,.0f}")
                if not shared:
                    for streams in CHUNKS_PER_STREAM:
                        cost, delay_ms = min(cpu_s_per_million_chunks(router, streams) for _ in range(rounds))
                        rows[router.name] += [f"{cost:.1f}", f"{delay_ms:.1f} ms"]
                    rows[router.name].append(f"{router.rss_mb():.0f} MB")
    header = ["", "requests / CPU-s", "CPU-s per 1M chunks, 64 streams", "p99", "512 streams", "p99", "RSS"]
    print(machine() + "\n")
    print(table([*header, "P/D requests / CPU-s"], [[name, *cells] for name, cells in rows.items()]))


if __name__ == "__main__":
    main()
