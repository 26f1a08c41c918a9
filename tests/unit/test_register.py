"""An engine stays known to its proxy: it comes back by itself, and leaves when it ends."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web

from deploy.ports import free_ports
from engine.api.distserve import HEARTBEAT_HEADER
from engine.server.address import reachable_url
from engine.server.register import Registration

ENGINE = "http://127.0.0.1:23333"
STATUS: dict[str, object] = {"role": 2, "models": ["m"], "speed": None}
DEADLINE_S = 10.0


class FakeProxy:
    """Remembers what it was told, and answers as it is set to."""

    def __init__(self, takes_heartbeats: bool = True) -> None:
        self.headers = {HEARTBEAT_HEADER: "1"} if takes_heartbeats else {}
        self.url = f"http://127.0.0.1:{free_ports(1)[0]}"
        self.nodes: dict[str, Any] = {}
        self.calls: asyncio.Queue[tuple[str, str | None]] = asyncio.Queue()
        self.status = 200

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        app = web.Application()
        app.router.add_post("/nodes/add", self._add)
        app.router.add_post("/nodes/remove", self._remove)
        app.router.add_get("/nodes/status", self._list)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", int(self.url.rsplit(":", 1)[1])).start()
        try:
            yield
        finally:
            await runner.cleanup()

    async def heard(self, path: str) -> str | None:
        """The key shown with the next call of `path`."""
        async with asyncio.timeout(DEADLINE_S):
            while True:
                called, key = await self.calls.get()
                if called == path:
                    return key

    async def _add(self, request: web.Request) -> web.Response:
        body = await request.json()
        if self.status == 200:
            self.nodes[body["url"]] = body["status"]
        self.calls.put_nowait((request.path, request.headers.get("Authorization")))
        return web.json_response("Added successfully", status=self.status, headers=self.headers)

    async def _remove(self, request: web.Request) -> web.Response:
        self.nodes.pop((await request.json())["url"], None)
        self.calls.put_nowait((request.path, request.headers.get("Authorization")))
        return web.json_response("Deleted successfully")

    async def _list(self, request: web.Request) -> web.Response:
        self.calls.put_nowait((request.path, request.headers.get("Authorization")))
        return web.json_response(self.nodes)


def registration(proxy: FakeProxy, key: str | None = None) -> Registration:
    return Registration(proxy.url, ENGINE, lambda: STATUS, key, heartbeat_seconds=0.05)


async def test_registered_while_inside_and_gone_after() -> None:
    proxy = FakeProxy()
    async with proxy.running():
        async with registration(proxy, key="secret"):
            assert await proxy.heard("/nodes/add") == "Bearer secret"
            assert proxy.nodes == {ENGINE: STATUS}
        assert proxy.nodes == {}


async def test_a_proxy_that_forgets_is_told_again() -> None:
    proxy = FakeProxy()
    async with proxy.running(), registration(proxy):
        await proxy.heard("/nodes/add")
        proxy.nodes.clear()
        await proxy.heard("/nodes/add")
        assert proxy.nodes == {ENGINE: STATUS}


async def test_a_proxy_that_takes_no_heartbeats_is_told_again_only_when_it_forgets() -> None:
    """LMDeploy's: whoever is added again loses its links there."""
    proxy = FakeProxy(takes_heartbeats=False)
    async with proxy.running(), registration(proxy, key="secret"):
        async with asyncio.timeout(DEADLINE_S):
            heard = [await proxy.calls.get() for _ in range(4)]
        assert heard == [("/nodes/add", "Bearer secret"), *[("/nodes/status", "Bearer secret")] * 3]
        proxy.nodes.clear()
        await proxy.heard("/nodes/add")
        assert proxy.nodes == {ENGINE: STATUS}


async def test_a_proxy_that_comes_late_or_restarts_is_found_and_each_change_is_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "engine.register")
    proxy = FakeProxy()
    async with registration(proxy) as membership:
        for _ in range(2):
            async with proxy.running():
                for _ in range(3):
                    await proxy.heard("/nodes/add")
            async with asyncio.timeout(DEADLINE_S):
                while membership.registered.is_set():  # noqa: ASYNC110, there is no event for the loss
                    await asyncio.sleep(0.01)
    said = [record.levelname for record in caplog.records if record.name == "engine.register"]
    assert said[-5:] == ["INFO", "WARNING", "INFO", "WARNING", "INFO"]  # the last: it left
    assert len(said) <= 6  # and perhaps that the proxy was not there at first


async def test_a_refusal_is_shown_with_its_reason(caplog: pytest.LogCaptureFixture) -> None:
    proxy = FakeProxy()
    proxy.status = 401
    async with proxy.running(), registration(proxy) as membership:
        await proxy.heard("/nodes/add")
        await proxy.heard("/nodes/add")
        assert not membership.registered.is_set()
        assert "refused this engine with 401" in caplog.text
    assert proxy.calls.empty() or proxy.nodes == {}


async def test_leaving_a_silent_proxy_ends_soon() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # the kernel accepts, nobody answers
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        silent.settimeout(DEADLINE_S)
        async with asyncio.timeout(DEADLINE_S), Registration(url, ENGINE, lambda: STATUS, None, 0.05):
            connection, _ = await asyncio.to_thread(silent.accept)
        connection.close()


@pytest.mark.parametrize(
    ("host", "proxy_url", "url"),
    [
        ("127.0.0.1", None, "http://127.0.0.1:9"),
        ("0.0.0.0", "http://127.0.0.1:8000", "http://127.0.0.1:9"),
        ("engine.example", None, "http://engine.example:9"),
        ("::1", None, "http://[::1]:9"),
    ],
)
def test_the_registered_url_can_be_reached(host: str, proxy_url: str | None, url: str) -> None:
    assert reachable_url("http", host, 9, proxy_url) == url


@pytest.mark.parametrize("host", ["0.0.0.0", "::", ""])
@pytest.mark.parametrize("proxy_url", [None, "http://no-such-host.invalid:1"])
def test_a_wildcard_is_never_registered(host: str, proxy_url: str | None) -> None:
    assert not any(wildcard in reachable_url("http", host, 9, proxy_url) for wildcard in ("0.0.0.0", "[::]", "//:"))
