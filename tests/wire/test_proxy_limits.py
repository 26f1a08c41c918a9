"""Keys, bounds and deadlines: what is too much, too slow or not allowed gets its answer and costs little."""

from __future__ import annotations

import asyncio
import signal
import ssl
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from proxy_process import ProxyProcess, running_proxy
from scripted_engine import Asked, ScriptedEngine

pytestmark = pytest.mark.asyncio(loop_scope="module")

COMPLETIONS, BODY = "/v1/completions", {"model": "m", "prompt": "Hi"}
PROXY_FLAGS = ("--max-inflight", "2", "--max-queue", "1", "--max-body-bytes", "2000", "--body-timeout", "0.5")
KEYS = ("--api-key", "user-1", "--api-key", "user-2", "--cluster-key", "cluster")


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


async def test_past_the_queue_it_is_429_with_retry_after(proxy: ProxyProcess) -> None:
    proceed = asyncio.Event()

    async def waiting(asked: Asked) -> None:
        await proceed.wait()
        asked.reply(200, {})

    async with ScriptedEngine() as engine:
        engine.scripts[COMPLETIONS] = waiting
        await proxy.add(engine)
        asking = [asyncio.create_task(proxy.post(COMPLETIONS, BODY)) for _ in range(3)]
        await engine.when_asked(COMPLETIONS, times=2)
        await proxy.until_queued(1)
        async with proxy.session.post(proxy.url + COMPLETIONS, json=BODY) as reply:
            assert (reply.status, int(reply.headers["Retry-After"]) >= 1) == (429, True)
            assert (await reply.json())["error"]["type"] == "rate_limit_error"
        proceed.set()
        assert [status for status, _ in await asyncio.gather(*asking)] == [200] * 3


async def test_a_client_that_leaves_the_queue_gives_its_place_up(proxy: ProxyProcess) -> None:
    async def waiting(asked: Asked) -> None:
        await asked.gone.wait()

    async with ScriptedEngine() as engine:
        engine.scripts[COMPLETIONS] = waiting
        await proxy.add(engine)
        asking = [asyncio.create_task(proxy.post(COMPLETIONS, BODY)) for _ in range(3)]
        await proxy.until_queued(1)
        for task in asking:
            task.cancel()
        await proxy.until_all_is_given_back()
        assert (await proxy.get("/nodes/overview"))[1]["queued"] == 0


@pytest.mark.parametrize("told", [True, False])
async def test_a_long_body_is_413(proxy: ProxyProcess, told: bool) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(40):
            yield b"x" * 100

    body = {"data": b"x" * 4000} if told else {"data": pieces()}
    async with proxy.session.post(proxy.url + COMPLETIONS, **body) as reply:  # type: ignore[arg-type]
        assert (reply.status, (await reply.json())["error"]["type"]) == (413, "invalid_request_error")


async def test_a_body_that_does_not_come_is_408_and_keeps_no_place(proxy: ProxyProcess) -> None:
    connections = [await asyncio.open_connection("127.0.0.1", proxy.port) for _ in range(2)]
    for _, writer in connections:
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
    for reader, writer in connections:
        assert b" 408 " in await asyncio.wait_for(reader.readline(), 4)
        writer.close()
    await proxy.until_all_is_given_back()


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"GET /" + b"x" * 40_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 40_000 + b"\r\n\r\n",
        b"NONSENSE\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    ],
)
async def test_malformed_and_oversized_heads_are_400(proxy: ProxyProcess, request_bytes: bytes) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    writer.write(request_bytes)
    assert (await asyncio.wait_for(reader.readline(), 5)).split()[1] == b"400"
    writer.close()
    assert (await proxy.get("/health"))[0] == 200


@pytest.mark.parametrize(
    ("path", "key", "status"),
    [
        (COMPLETIONS, None, 401),
        (COMPLETIONS, "wrong", 401),
        (COMPLETIONS, "user-1", 200),
        (COMPLETIONS, "user-2", 200),
        (COMPLETIONS, "cluster", 200),
        ("/generate", None, 401),
        ("/distserve/gc", None, 401),
        ("/distserve/gc", "user-1", 401),
        ("/distserve/gc", "cluster", 200),
        ("/nodes/add", "user-1", 401),
        ("/nodes/remove", None, 401),
    ],
)
async def test_keys_open_what_they_should(keyed: ProxyProcess, path: str, key: str | None, status: int) -> None:
    async with keyed.session.post(keyed.url + path, json=BODY, headers=bearer(key) if key else {}) as reply:
        assert reply.status == status
        if status == 401:
            assert reply.headers["WWW-Authenticate"] == "Bearer"
            body = await reply.json()
            flat = path.startswith(("/nodes", "/distserve"))
            assert (body if flat else body["error"])["type"] == "authentication_error"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def keyed() -> AsyncIterator[ProxyProcess]:
    async with running_proxy(*KEYS) as proxy, ScriptedEngine() as engine:
        status = {"role": 1, "models": ["m"]}
        body = {"url": engine.url, "status": status}
        assert (await proxy.post("/nodes/add", body, headers=bearer("cluster")))[0] == 200
        yield proxy
        assert {asked.headers["authorization"] for asked in engine.asked} == {"Bearer cluster"}  # probes too


@pytest.mark.parametrize("path", ["/", "/health", "/metrics", "/docs", "/openapi.json"])
async def test_what_shows_no_secret_is_open(keyed: ProxyProcess, path: str) -> None:
    async with keyed.session.get(keyed.url + path) as reply:
        assert reply.status == 200


async def test_keys_for_users_alone_are_warned_of() -> None:
    async with running_proxy("--api-key", "user-1") as proxy:
        await proxy.until_logged("without --cluster-key")


async def test_sigterm_lets_streams_end_and_exits_0() -> None:
    proceed = asyncio.Event()

    async def pausing(asked: Asked) -> None:
        asked.stream_head()
        asked.event("first")
        await proceed.wait()
        asked.end()

    async with running_proxy() as proxy, ScriptedEngine() as engine:
        engine.scripts[COMPLETIONS] = pausing
        await proxy.add(engine)
        async with proxy.session.post(proxy.url + COMPLETIONS, json=BODY) as reply:
            await reply.content.readline()
            proxy.process.send_signal(signal.SIGTERM)
            await proxy.until_logged("stopping")
            with pytest.raises(ConnectionRefusedError):
                await asyncio.open_connection("127.0.0.1", proxy.port)
            proceed.set()
            assert b"[DONE]" in await reply.read()
        assert await asyncio.wait_for(proxy.process.wait(), 10) == 0


async def test_a_port_in_use_is_one_line(proxy: ProxyProcess) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "proxy", "--port", str(proxy.port), stderr=asyncio.subprocess.PIPE
    )
    _, said = await asyncio.wait_for(process.communicate(), 20)
    assert process.returncode == 1
    assert f"cannot listen on 127.0.0.1:{proxy.port}" in said.decode()
    assert "Traceback" not in said.decode()


async def test_https(tmp_path: Path) -> None:
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    request = ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost"]
    openssl = await asyncio.create_subprocess_exec(
        "openssl", *request, "-keyout", key, "-out", certificate, stderr=asyncio.subprocess.DEVNULL
    )
    assert await openssl.wait() == 0
    async with running_proxy("--ssl-certfile", str(certificate), "--ssl-keyfile", str(key)) as proxy:
        assert proxy.url.startswith("https://")
        context = ssl.create_default_context(cafile=str(certificate))
        context.check_hostname = False
        async with ScriptedEngine() as engine:
            added = await proxy.post("/nodes/add", {"url": engine.url}, ssl=context)
            assert added == (200, "Added successfully")
            async with proxy.session.post(proxy.url + COMPLETIONS, json=BODY | {"stream": True}, ssl=context) as reply:
                assert b"[DONE]" in await reply.read()
