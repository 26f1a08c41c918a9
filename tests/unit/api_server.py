"""An engine's API process on a real socket, in front of a stand-in core."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cache
from typing import Any, cast

import aiohttp
from aiohttp import web
from openai import AsyncOpenAI

from engine.client import CoreClient
from engine.config import EngineSettings
from engine.server.app import create_app
from engine.text.tokenizer import Tokenizer
from tests.unit.fake_core import FakeCore, Script


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.load("smollm2")


def ids(text: str) -> list[int]:
    return tokenizer().encode(text, add_special_tokens=False)


class ApiServer:
    port: int
    http: aiohttp.ClientSession

    def __init__(self, core: FakeCore) -> None:
        self.core = core
        self.no_delay: list[int] = []  # TCP_NODELAY of the connection of every answer

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def openai(self, key: str = "none") -> AsyncOpenAI:
        return AsyncOpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0)

    async def post(self, path: str, body: Any, **headers: str) -> tuple[int, Any]:
        async with self.http.post(self.url + path, json=body, headers=headers) as reply:
            return reply.status, await reply.json()

    async def post_text(self, path: str, body: Any) -> str:
        async with self.http.post(self.url + path, json=body) as reply:
            return await reply.text()

    async def watch(self, request: web.Request, response: web.StreamResponse) -> None:
        assert request.transport is not None
        connection = request.transport.get_extra_info("socket")
        self.no_delay.append(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))

    async def raw(self, request: bytes) -> bytes:
        """Whatever comes back until the server closes or falls silent after an answer."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(request)
        async with asyncio.timeout(5):
            head = await reader.readuntil(b"\r\n\r\n")
        writer.close()
        return head


@asynccontextmanager
async def serve(script: Script, **settings: Any) -> AsyncIterator[ApiServer]:
    server = ApiServer(FakeCore(script))
    app = create_app(EngineSettings(model="smollm2", **settings), cast(CoreClient, server.core), tokenizer())
    app.on_response_prepare.append(server.watch)
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        server.port = runner.addresses[0][1]
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(10)) as server.http:
            yield server
    finally:
        await runner.cleanup()
