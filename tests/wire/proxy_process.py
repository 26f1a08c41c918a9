"""The real proxy, as a process, and what tests ask of it."""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
from scripted_engine import ScriptedEngine

QUICK = ("--probe-interval", "0.2", "--probe-timeout", "0.3", "--log-level", "debug")
ROLES = {"hybrid": 1, "prefill": 2, "decode": 3}


class ProxyProcess:
    def __init__(self, process: asyncio.subprocess.Process, url: str, session: aiohttp.ClientSession) -> None:
        self.process, self.url, self.session = process, url, session
        self.port = int(url.rsplit(":", 1)[1])
        self.log: list[str] = []

    async def post(self, path: str, body: object, **kwargs: Any) -> tuple[int, Any]:
        """Status and JSON of the reply."""
        raw = isinstance(body, bytes)
        async with self.session.post(self.url + path, **({"data": body} if raw else {"json": body}), **kwargs) as reply:
            return reply.status, await reply.json()

    async def get(self, path: str, **kwargs: Any) -> tuple[int, Any]:
        async with self.session.get(self.url + path, **kwargs) as reply:
            return reply.status, await reply.json()

    async def add(self, engine: ScriptedEngine, role: str = "hybrid", incarnation: str | None = None) -> None:
        status: dict[str, object] = {"role": ROLES[role], "models": ["m"]}
        if incarnation is not None:
            status["incarnation"] = incarnation
        assert await self.post("/nodes/add", {"url": engine.url, "status": status}) == (200, "Added successfully")

    async def pair(self, prefill: ScriptedEngine, decode: ScriptedEngine) -> None:
        """Registered and linked."""
        await self.add(prefill, "prefill", "p-1")
        await self.add(decode, "decode", "d-1")
        assert await self.post("/distserve/connection_warmup", {}) == (200, {"SUCCESS": True})

    async def node(self, engine: ScriptedEngine) -> dict[str, Any]:
        nodes = (await self.get("/nodes/overview"))[1]["nodes"]
        return dict(next(node for node in nodes if node["url"] == engine.url))

    async def until_true(self, holds: Callable[[Any], bool], path: str = "/nodes/overview") -> None:
        """Asks again and again; the deadline is the promise."""
        async with asyncio.timeout(8):
            while not holds((await self.get(path))[1]):  # noqa: ASYNC110 (another process has no event for us)
                await asyncio.sleep(0.02)

    async def until(self, engine: ScriptedEngine, **expected: object) -> None:
        def holds(view: Any) -> bool:
            node = next(node for node in view["nodes"] if node["url"] == engine.url)
            return all(node[name] == value for name, value in expected.items())

        await self.until_true(holds)

    async def until_queued(self, number: int) -> None:
        await self.until_true(lambda view: view["queued"] == number)

    async def until_logged(self, text: str) -> None:
        async with asyncio.timeout(8):
            while not any(text in line for line in self.log):  # noqa: ASYNC110 (another process has no event for us)
                await asyncio.sleep(0.01)

    async def forget_all(self) -> None:
        for url in (await self.get("/nodes/status"))[1]:
            await self.post("/nodes/remove", {"url": url})

    async def until_all_is_given_back(self) -> None:
        """Nothing under way and nothing counted as unfinished."""
        await self.until_true(
            lambda view: view["in_flight"] == 0 and all(node["unfinished"] == 0 for node in view["nodes"])
        )


@asynccontextmanager
async def running_proxy(*flags: str) -> AsyncIterator[ProxyProcess]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "proxy", "--port", "0", *QUICK, *flags, stderr=asyncio.subprocess.PIPE
    )
    assert process.stderr is not None
    try:
        line = ""
        async with asyncio.timeout(20):
            while "listening on" not in line:
                line = (await process.stderr.readline()).decode()
                assert line, "the proxy ended before it listened"
        url = re.search(r"https?://\S+", line)
        assert url is not None
        async with aiohttp.ClientSession() as session:
            proxy = ProxyProcess(process, url[0], session)
            reading = asyncio.create_task(_read_log(process.stderr, proxy.log))
            yield proxy
        if process.returncode is None:
            process.terminate()
        async with asyncio.timeout(20):
            assert await process.wait() == 0
        await reading
        assert not [line for line in proxy.log if "Traceback" in line], "".join(proxy.log)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def _read_log(stream: asyncio.StreamReader, lines: list[str]) -> None:
    while line := await stream.readline():
        lines.append(line.decode())
