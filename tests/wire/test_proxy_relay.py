"""One engine behind the proxy: its bytes arrive unchanged, its failures become true answers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import aiohttp
import openai
import pytest
import pytest_asyncio
from proxy_process import ProxyProcess
from scripted_engine import EVENTS, Asked, ScriptedEngine, chunk, sse

pytestmark = pytest.mark.asyncio(loop_scope="module")

COMPLETIONS = "/v1/completions"
BODY = {"model": "m", "prompt": "Hi"}
PROXY_FLAGS = ("--idle-timeout", "1.5")


@pytest_asyncio.fixture(loop_scope="module")
async def engine(proxy: ProxyProcess) -> AsyncIterator[ScriptedEngine]:
    async with ScriptedEngine("one") as engine:
        await proxy.add(engine)
        yield engine


async def raw(proxy: ProxyProcess, request: bytes) -> bytes:
    """All that comes back until the proxy closes the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    writer.write(request)
    try:
        async with asyncio.timeout(10):
            return await reader.read(-1)
    finally:
        writer.close()


def request_bytes(body: object, version: str = "1.1", *headers: str) -> bytes:
    content = json.dumps(body).encode()
    lines = [f"POST {COMPLETIONS} HTTP/{version}", "Host: x", "Connection: close", f"Content-Length: {len(content)}"]
    return "\r\n".join([*lines, *headers, "", ""]).encode() + content


async def test_the_body_goes_to_the_engine_byte_for_byte(proxy: ProxyProcess, engine: ScriptedEngine) -> None:
    body = b'{ "model" : "m","prompt":"Gr\xc3\xbc\xc3\x9fe", "seed":1.50, "unknown": [1,  2]}'
    status, reply = await proxy.post(COMPLETIONS, body)
    assert (status, reply["by"]) == (200, "one")
    assert engine.requests(COMPLETIONS)[0].body == body


async def test_a_stream_arrives_byte_for_byte(proxy: ProxyProcess, engine: ScriptedEngine) -> None:
    reply = await raw(proxy, request_bytes(BODY | {"stream": True}))
    head, _, body = reply.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"Content-Type: text/event-stream" in head
    assert body == b"".join(chunk(sse(text)) for text in EVENTS) + chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"


async def test_events_arrive_as_they_come(proxy: ProxyProcess, engine: ScriptedEngine) -> None:
    proceed = asyncio.Event()

    async def pausing(asked: Asked) -> None:
        asked.stream_head()
        asked.event("first")
        await proceed.wait()
        asked.end()

    engine.scripts[COMPLETIONS] = pausing
    async with proxy.session.post(proxy.url + COMPLETIONS, json=BODY | {"stream": True}) as reply:
        assert await asyncio.wait_for(reply.content.readline(), 5) == sse("first").rstrip() + b"\n"
        proceed.set()
        assert b"[DONE]" in await reply.content.read()


async def test_a_client_of_http_1_0_gets_the_bare_body(proxy: ProxyProcess, engine: ScriptedEngine) -> None:
    reply = await raw(proxy, request_bytes(BODY | {"stream": True}, "1.0"))
    head, _, body = reply.partition(b"\r\n\r\n")
    assert b"chunked" not in head
    assert body == b"".join(map(sse, EVENTS)) + b"data: [DONE]\n\n"


async def test_a_body_of_unknown_length_is_passed_to_its_close(proxy: ProxyProcess, engine: ScriptedEngine) -> None:
    async def until_close(asked: Asked) -> None:
        asked.raw(b"HTTP/1.0 200 OK\r\nContent-Type: text/plain\r\n\r\nall of it")
        asked.writer.close()

    engine.scripts[COMPLETIONS] = until_close
    reply = await raw(proxy, request_bytes(BODY))
    assert reply.endswith(b"\r\n\r\nall of it")


async def test_headers_are_passed_but_not_the_connections_own(proxy: ProxyProcess, engine: ScriptedEngine) -> None:
    headers = {
        "X-Request-Id": "r-1",
        "traceparent": "00-a",
        "Authorization": "Bearer user",
        "Cookie": "c=1",
        "X-Tandem-Handoff": "{}",
        "Accept-Encoding": "gzip",
        "TE": "trailers",
    }

    async def answering(asked: Asked) -> None:
        asked.reply(200, {}, "X-Request-Id: r-1", "Connection: keep-alive", "Keep-Alive: timeout=5")

    engine.scripts[COMPLETIONS] = answering
    async with proxy.session.post(proxy.url + COMPLETIONS, json=BODY, headers=headers) as reply:
        assert reply.headers["X-Request-Id"] == "r-1"
        assert "Keep-Alive" not in reply.headers
    seen = engine.requests(COMPLETIONS)[0].headers
    assert (seen["x-request-id"], seen["traceparent"], seen["authorization"]) == ("r-1", "00-a", "Bearer user")
    assert not {"cookie", "x-tandem-handoff", "accept-encoding", "te"} & seen.keys()
    assert seen["host"] == f"127.0.0.1:{engine.port}"


async def test_connections_to_an_engine_are_reused(proxy: ProxyProcess, engine: ScriptedEngine) -> None:
    for _ in range(20):
        assert (await proxy.post(COMPLETIONS, BODY))[0] == 200
    assert len({asked.writer for asked in engine.requests(COMPLETIONS)}) <= 2


async def test_a_burst_opens_few_connections_at_once_and_is_answered(
    proxy: ProxyProcess, engine: ScriptedEngine
) -> None:
    replies = await asyncio.gather(*(proxy.post(COMPLETIONS, BODY) for _ in range(200)))
    assert {status for status, _ in replies} == {200}
    assert (await proxy.node(engine))["faults"] == {}


async def test_a_kept_connection_that_the_engine_has_closed_costs_nothing(
    proxy: ProxyProcess, engine: ScriptedEngine
) -> None:
    async def closing_on_the_second(asked: Asked) -> None:
        if len([other for other in engine.requests(COMPLETIONS) if other.writer is asked.writer]) > 1:
            asked.cut()  # as an engine does whose keep-alive ends while the request is on its way
        else:
            asked.reply(200, {"by": "one"})

    engine.scripts[COMPLETIONS] = closing_on_the_second
    for _ in range(6):
        assert (await proxy.post(COMPLETIONS, BODY)) == (200, {"by": "one"})
    assert (await proxy.node(engine))["faults"] == {}


@pytest.mark.parametrize("status", [400, 404, 409, 422, 429])
async def test_an_engines_refusal_is_the_answer(proxy: ProxyProcess, engine: ScriptedEngine, status: int) -> None:
    async def refusing(asked: Asked) -> None:
        asked.reply(status, {"error": {"message": "no"}}, "Retry-After: 7")

    engine.scripts[COMPLETIONS] = refusing
    for _ in range(5):
        async with proxy.session.post(proxy.url + COMPLETIONS, json=BODY) as reply:
            assert (reply.status, await reply.json()) == (status, {"error": {"message": "no"}})
            assert reply.headers["Retry-After"] == "7"
    node = await proxy.node(engine)
    assert (node["up"], node["faults"]) == (True, {})


@pytest.mark.parametrize("status", [500, 502, 503])
async def test_an_engines_own_failure_is_tried_elsewhere(
    proxy: ProxyProcess, engine: ScriptedEngine, status: int
) -> None:
    async def failing(asked: Asked) -> None:
        asked.reply(status, {"error": {"message": "broken"}})

    engine.scripts[COMPLETIONS] = failing
    async with ScriptedEngine("two") as other:
        await proxy.add(other)
        for _ in range(8):
            assert (await proxy.post(COMPLETIONS, BODY))[1]["by"] == "two"
        assert engine.requests(COMPLETIONS)  # it was asked, and nobody noticed


async def test_a_failure_that_nobody_else_can_mend_is_passed_on(proxy: ProxyProcess, engine: ScriptedEngine) -> None:
    async def failing(asked: Asked) -> None:
        asked.reply(500, {"error": {"message": "broken"}})

    engine.scripts[COMPLETIONS] = failing
    assert await proxy.post(COMPLETIONS, BODY) == (500, {"error": {"message": "broken"}})


async def test_a_request_that_breaks_engines_is_not_shown_to_all(proxy: ProxyProcess, engine: ScriptedEngine) -> None:
    async def dying(asked: Asked) -> None:
        asked.cut()

    others = [ScriptedEngine(str(number)) for number in range(3)]
    for each in (engine, *others):
        each.scripts[COMPLETIONS] = dying
    async with others[0], others[1], others[2]:
        for other in others:
            await proxy.add(other)
        status, reply = await proxy.post(COMPLETIONS, BODY)
        assert (status, reply["error"]["code"]) == (502, "upstream_reset")
        assert sum(len(each.requests(COMPLETIONS)) for each in (engine, *others)) <= 4  # each once more, if kept alive


async def test_an_engine_that_a_request_has_killed_has_seen_it(proxy: ProxyProcess, engine: ScriptedEngine) -> None:
    others = [ScriptedEngine(str(number)) for number in range(3)]
    deaths: list[asyncio.Task[None]] = []

    def kills(each: ScriptedEngine) -> object:
        async def dying(asked: Asked) -> None:
            deaths.append(asyncio.create_task(each.die()))

        return dying

    async with others[0], others[1], others[2]:
        for other in others:
            await proxy.add(other)
        for each in (engine, *others):
            await each.when_asked("/health")  # on a connection that is kept for the request
            each.scripts[COMPLETIONS] = kills(each)  # type: ignore[assignment]
        assert (await proxy.post(COMPLETIONS, BODY))[0] in (502, 503)
        assert sum(len(each.requests(COMPLETIONS)) for each in (engine, *others)) == 2
        await asyncio.gather(*deaths)


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"HTTP/1.1 200 OK\r\nContent-Le",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"SSH-2.0-x\r\n\r\n",
    ],
)
async def test_death_before_the_first_byte_is_a_true_status(
    proxy: ProxyProcess, engine: ScriptedEngine, said: bytes
) -> None:
    async def dying(asked: Asked) -> None:
        asked.raw(said)
        await asyncio.sleep(0.02)  # let it be sent
        asked.cut()

    engine.scripts[COMPLETIONS] = dying
    status, reply = await proxy.post(COMPLETIONS, BODY | {"stream": True})
    assert status == 502
    assert reply["error"]["type"] == "server_error"


async def test_death_before_the_first_byte_is_mended_by_another(proxy: ProxyProcess, engine: ScriptedEngine) -> None:
    async def dying(asked: Asked) -> None:
        asked.stream_head()  # the head alone is not an answer
        await asyncio.sleep(0.02)
        asked.cut()

    engine.scripts[COMPLETIONS] = dying
    async with ScriptedEngine("two") as other:
        await proxy.add(other)
        for _ in range(6):
            async with proxy.session.post(proxy.url + COMPLETIONS, json=BODY | {"stream": True}) as reply:
                assert b"[DONE]" in await reply.read()


@pytest.mark.parametrize("half", [b"", b"40\r\ndata: {"])
async def test_death_in_a_stream_is_an_error_event_and_a_proper_end(
    proxy: ProxyProcess, engine: ScriptedEngine, half: bytes
) -> None:
    async def dying(asked: Asked) -> None:
        asked.stream_head()
        asked.event("Hel")
        asked.raw(half)
        await asyncio.sleep(0.05)
        asked.cut()

    engine.scripts[COMPLETIONS] = dying
    async with proxy.session.post(proxy.url + COMPLETIONS, json=BODY | {"stream": True}) as reply:
        events = [line for line in (await reply.read()).split(b"\n") if line]
    assert reply.status == 200
    assert events[0] == sse("Hel").strip()
    error = json.loads(events[1].removeprefix(b"data: "))["error"]
    assert (error["code"], error["type"]) == ("upstream_reset", "server_error")
    assert len(events) == 2


async def test_the_openai_client_raises_that_error(proxy: ProxyProcess, engine: ScriptedEngine) -> None:
    async def dying(asked: Asked) -> None:
        asked.stream_head()
        asked.event("Hel")
        await asyncio.sleep(0.05)
        asked.cut()

    engine.scripts[COMPLETIONS] = dying
    async with (
        openai.AsyncOpenAI(base_url=proxy.url + "/v1", api_key="x", max_retries=0) as client,
        await client.completions.create(model="m", prompt="Hi", stream=True) as stream,
    ):
        with pytest.raises(openai.APIError, match="closed the connection"):
            async for _ in stream:
                pass


@pytest.mark.parametrize(
    "head",
    [b"Content-Length: 100\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n5\r\n"],
)
async def test_a_truncated_answer_never_looks_whole(proxy: ProxyProcess, engine: ScriptedEngine, head: bytes) -> None:
    async def dying(asked: Asked) -> None:
        asked.raw(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n" + head + b'{"a":\r\n1\r\n}\r\n')
        await asyncio.sleep(0.05)
        asked.cut()

    engine.scripts[COMPLETIONS] = dying
    with pytest.raises(aiohttp.ClientPayloadError):
        async with proxy.session.post(proxy.url + COMPLETIONS, json=BODY) as reply:
            await reply.read()


async def test_a_silent_stream_ends_in_an_error(proxy: ProxyProcess, engine: ScriptedEngine) -> None:
    async def falling_silent(asked: Asked) -> None:
        asked.stream_head()
        asked.event("Hel")
        await asked.gone.wait()

    engine.scripts[COMPLETIONS] = falling_silent
    async with proxy.session.post(proxy.url + COMPLETIONS, json=BODY | {"stream": True}) as reply:
        assert b"upstream_timeout" in await asyncio.wait_for(reply.read(), 6)


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_is_gone_from_the_engine_at_once(
    proxy: ProxyProcess, engine: ScriptedEngine, stream: bool
) -> None:
    async def working(asked: Asked) -> None:
        if stream:
            asked.stream_head()
            asked.event("Hel")
        await asked.gone.wait()

    engine.scripts[COMPLETIONS] = working
    _, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    writer.write(request_bytes(BODY | {"stream": stream}))
    asked = await engine.when_asked(COMPLETIONS)
    assert not asked.gone.is_set()
    writer.close()
    await asyncio.wait_for(asked.gone.wait(), 2)
    await proxy.until(engine, unfinished=0)


async def test_a_slow_client_slows_the_engine_and_loses_nothing(proxy: ProxyProcess, engine: ScriptedEngine) -> None:
    total, sent = 400, 0
    event = chunk(b"data: " + b"x" * 65_000 + b"\n\n")

    async def flooding(asked: Asked) -> None:
        nonlocal sent
        asked.stream_head()
        for _ in range(total):
            asked.raw(event)
            await asked.writer.drain()
            sent += 1
        asked.raw(b"0\r\n\r\n")

    engine.scripts[COMPLETIONS] = flooding
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port, limit=1024)
    writer.write(request_bytes(BODY | {"stream": True}))
    await reader.readuntil(b"\r\n\r\n")
    before = -1
    while before != sent:  # the engine's writes have come to a halt
        before = sent
        await asyncio.sleep(0.2)
    assert sent < total / 2
    body = await asyncio.wait_for(reader.read(-1), 20)
    assert body == event * total + b"0\r\n\r\n"
    writer.close()


async def test_a_client_that_takes_nothing_is_left(proxy: ProxyProcess, engine: ScriptedEngine) -> None:
    async def flooding(asked: Asked) -> None:
        asked.stream_head()
        while not asked.gone.is_set():
            asked.raw(chunk(b"data: " + b"x" * 65_000 + b"\n\n"))
            await asked.writer.drain()

    engine.scripts[COMPLETIONS] = flooding
    _, writer = await asyncio.open_connection("127.0.0.1", proxy.port, limit=1024)
    writer.write(request_bytes(BODY | {"stream": True}))
    asked = await engine.when_asked(COMPLETIONS)
    await asyncio.wait_for(asked.gone.wait(), 8)
    writer.close()


async def test_a_client_that_asks_on_and_takes_nothing_is_not_answered_on(
    proxy: ProxyProcess, engine: ScriptedEngine
) -> None:
    async def long(asked: Asked) -> None:
        asked.reply(200, b'"' + b"x" * 60_000 + b'"')

    engine.scripts[COMPLETIONS] = long
    _, writer = await asyncio.open_connection("127.0.0.1", proxy.port, limit=1024)
    writer.write(request_bytes(BODY).replace(b"Connection: close\r\n", b"") * 1000)
    await engine.when_asked(COMPLETIONS)
    before = -1
    while before != len(engine.requests(COMPLETIONS)):
        before = len(engine.requests(COMPLETIONS))
        await asyncio.sleep(0.3)
    assert len(engine.requests(COMPLETIONS)) < 500  # what the kernel holds is a few megabytes
    writer.close()


async def test_pipelined_requests_are_answered_in_order(proxy: ProxyProcess, engine: ScriptedEngine) -> None:
    one = request_bytes(BODY).replace(b"Connection: close\r\n", b"")
    reply = await raw(proxy, one * 2 + request_bytes(BODY))
    assert reply.count(b"HTTP/1.1 200") == 3


@pytest.mark.parametrize("path", ["/generate", "/v1/embeddings", "/tokenize", "/v1/responses", "/rerank"])
async def test_other_routes_of_engines_are_passed_on(proxy: ProxyProcess, engine: ScriptedEngine, path: str) -> None:
    async def answering(asked: Asked) -> None:
        asked.reply(200, {"route": asked.path})

    engine.scripts[path] = answering
    assert await proxy.post(path, {"model": "m"}) == (200, {"route": path})
    assert await proxy.post(path, {}) == (200, {"route": path})  # there is only one model


async def test_models_are_listed_once(proxy: ProxyProcess, engine: ScriptedEngine) -> None:
    async with ScriptedEngine("two") as other:
        await proxy.add(other)
        async with openai.AsyncOpenAI(base_url=proxy.url + "/v1", api_key="x") as client:
            assert [model.id async for model in client.models.list()] == ["m"]
            assert (await client.models.retrieve("m")).id == "m"
            with pytest.raises(openai.NotFoundError):
                await client.models.retrieve("nobody")


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"{", 400, "invalid_json"),
        (b"", 400, "invalid_json"),
        (b"[1]", 400, "invalid_value"),
        (b'{"model": 3}', 400, "invalid_value"),
        (b'{"model": "other"}', 404, "model_not_found"),
    ],
)
async def test_bad_requests_end_here(
    proxy: ProxyProcess, engine: ScriptedEngine, body: bytes, status: int, code: str
) -> None:
    got, reply = await proxy.post(COMPLETIONS, body)
    assert (got, reply["error"]["code"]) == (status, code)
    assert engine.requests(COMPLETIONS) == []


async def test_wrong_routes_and_methods_are_told(proxy: ProxyProcess, engine: ScriptedEngine) -> None:
    status, reply = await proxy.get("/v1/nonsense")
    assert (status, reply["error"]["type"]) == (404, "not_found_error")
    status, reply = await proxy.get(COMPLETIONS)
    assert (status, reply["error"]["type"]) == (405, "invalid_request_error")


async def test_without_an_engine_it_is_503_and_with_a_dead_one_too(proxy: ProxyProcess) -> None:
    status, reply = await proxy.post(COMPLETIONS, BODY)
    assert (status, reply["error"]["code"]) == (503, "no_engine")
    async with ScriptedEngine() as engine:
        await proxy.add(engine)
    await proxy.until(engine, up=False)
    status, reply = await proxy.post(COMPLETIONS, BODY)
    assert (status, reply["error"]["code"]) == (503, "no_engine")


async def test_metrics_tell_what_happened(proxy: ProxyProcess, engine: ScriptedEngine) -> None:
    await proxy.post(COMPLETIONS, BODY)
    async with proxy.session.get(proxy.url + "/metrics") as reply:
        text = await reply.text()
    assert f'tandem_proxy_node_served_total{{node="{engine.url}",role="hybrid"}} 1.0' in text
    assert 'tandem_proxy_requests_total{route="/v1/completions",status="200"}' in text
    for name in ("in_flight", "relayed_bytes_total", "first_byte_seconds_bucket", "links", "node_up"):
        assert f"tandem_proxy_{name}" in text
