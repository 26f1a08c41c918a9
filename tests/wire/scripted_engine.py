"""A stand-in for an engine: it speaks an engine's HTTP, writes down what it is asked, and computes nothing.

It is no engine and proves nothing about one. Each test scripts what it answers on a path, byte for byte if need be, so
that the proxy meets every kind of reply, refusal and death.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

CONFIG = {
    "tp_size": 1,
    "ep_size": 1,
    "dp_size": 1,
    "pp_size": None,
    "dp_rank": 0,
    "block_size": 16,
    "num_cpu_blocks": 0,
    "num_gpu_blocks": 100,
}
EVENTS = ("Hel", "lo", "!")


@dataclass(eq=False)
class Asked:
    """One request, and the means to answer it."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    writer: asyncio.StreamWriter
    gone: asyncio.Event = field(default_factory=asyncio.Event)  # the proxy has closed the connection

    @property
    def json(self) -> dict[str, Any]:
        return dict(json.loads(self.body))

    def raw(self, data: bytes) -> None:
        self.writer.write(data)

    def reply(self, status: int, value: object, *headers: str) -> None:
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        lines = [f"HTTP/1.1 {status} Scripted", "Content-Type: application/json", f"Content-Length: {len(content)}"]
        self.raw("\r\n".join([*lines, *headers, "", ""]).encode() + content)

    def stream_head(self) -> None:
        self.raw(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")

    def event(self, text: str) -> None:
        self.raw(chunk(sse(text)))

    def end(self) -> None:
        self.raw(chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")

    def cut(self) -> None:
        """As a killed process does."""
        self.writer.transport.abort()


async def _next_byte(reader: asyncio.StreamReader) -> bytes:
    """Empty once the other side is gone, however it went."""
    try:
        return await reader.read(1)
    except ConnectionError:
        return b""


Script = Callable[[Asked], Awaitable[None]]


def sse(text: str) -> bytes:
    return b"data: " + json.dumps({"choices": [{"text": text}]}).encode() + b"\n\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


class ScriptedEngine:
    """`async with ScriptedEngine() as engine:` listens on a port of its own."""

    def __init__(self, name: str = "engine", ours: bool = True, port: int = 0) -> None:
        self.name, self.ours, self.port = name, ours, port
        self.asked: list[Asked] = []
        self.scripts: dict[str, Script] = {}
        self.arrived = asyncio.Condition()
        self._connections: set[socket.socket] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def __aenter__(self) -> ScriptedEngine:
        self._socket = socket.create_server(("127.0.0.1", self.port))
        self._socket.setblocking(False)
        self.port = self._socket.getsockname()[1]
        asyncio.get_running_loop().add_reader(self._socket, self._accept)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.die()

    async def die(self) -> None:
        """Stops listening and breaks every connection. Idempotent."""
        if self._socket.fileno() >= 0:
            asyncio.get_running_loop().remove_reader(self._socket)
        self._socket.close()
        for writer in list(self._writers):
            writer.transport.abort()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for connection in self._connections:  # not served yet
            connection.close()

    def requests(self, path: str) -> list[Asked]:
        return [asked for asked in self.asked if asked.path == path]

    async def when_asked(self, path: str, times: int = 1) -> Asked:
        """The `times`-th request for `path`, as soon as it is there."""
        async with asyncio.timeout(10), self.arrived:
            await self.arrived.wait_for(lambda: len(self.requests(path)) >= times)
        return self.requests(path)[times - 1]

    def _accept(self) -> None:
        # By hand: asyncio's own server leaks connections that arrive while it is being closed.
        connection, _ = self._socket.accept()
        connection.setblocking(False)
        task = asyncio.create_task(self._connected(connection))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self._connections.add(connection)

    async def _connected(self, connection: socket.socket) -> None:
        reader, writer = await asyncio.open_connection(sock=connection)
        self._connections.discard(connection)
        self._writers.add(writer)
        try:
            await self._serve(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self._writers.discard(writer)
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        first = b""
        while True:
            head = (first + await reader.readuntil(b"\r\n\r\n")).decode()
            asked = await self._read(head, reader, writer)
            self.asked.append(asked)
            async with self.arrived:
                self.arrived.notify_all()
            answering = asyncio.create_task(self._script(asked)(asked))
            following = asyncio.create_task(_next_byte(reader))
            try:
                first = await following
                if not first:
                    asked.gone.set()
                    await asyncio.wait([answering], timeout=1)
                    return
                await answering
            finally:
                following.cancel()
                answering.cancel()

    async def _read(self, head: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Asked:
        request_line, *lines = head.rstrip("\r\n").split("\r\n")
        method, path, _ = request_line.split(" ")
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        return Asked(method, path, headers, body, writer)

    def _script(self, asked: Asked) -> Script:
        if asked.path in self.scripts:
            return self.scripts[asked.path]
        name = asked.path.strip("/").replace("/", "_")
        return getattr(self, f"_{name}", self._no_such_route)

    # what an engine answers when nothing else is scripted

    async def _no_such_route(self, asked: Asked) -> None:
        asked.reply(404, {"error": {"message": "no such route"}})

    async def _health(self, asked: Asked) -> None:
        asked.reply(200, b"")

    async def _v1_models(self, asked: Asked) -> None:
        asked.reply(200, {"object": "list", "data": [{"id": "m", "object": "model"}]})

    async def _v1_completions(self, asked: Asked) -> None:
        """LMDeploy's answer of a prefill, the stream or the JSON of anything else; all say who spoke."""
        request = asked.json
        if request.get("stream"):
            asked.stream_head()
            for text in EVENTS:
                asked.event(text)
            asked.end()
        elif request.get("with_cache"):
            asked.reply(200, {"id": "77", "by": self.name, "cache_block_ids": [5, 6], "remote_token_ids": [42]})
        else:
            asked.reply(200, {"id": "cmpl-1", "by": self.name, "choices": [{"text": "Hello!"}]})

    _v1_chat_completions = _v1_completions

    async def _distserve_engine_info(self, asked: Asked) -> None:
        asked.reply(200, json.dumps(CONFIG) if self.ours else CONFIG)

    async def _distserve_p2p_initialize(self, asked: Asked) -> None:
        info = json.dumps({"tandem": 1, "name": self.name} if self.ours else {"mr": "somebody else's"})
        asked.reply(
            200,
            {
                "status": 1,
                "engine_endpoint_info": {"zmq_address": f"tcp://{self.name}:1"},
                "kvtransfer_endpoint_info": [{"protocol": 2, "endpoint_info": info}],
            },
        )

    async def _distserve_p2p_connect(self, asked: Asked) -> None:
        asked.reply(200, {"status": 1})

    async def _distserve_p2p_drop_connect(self, asked: Asked) -> None:
        asked.reply(200, {"success": True})

    async def _distserve_free_cache(self, asked: Asked) -> None:
        asked.reply(200, {"status": "SUCCESS"})

    async def _terminate(self, asked: Asked) -> None:
        asked.reply(200, {"success": True})
