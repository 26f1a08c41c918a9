"""Engines come, hang, die and return; requests go where they can be answered."""

from __future__ import annotations

import asyncio
import time

import pytest
from proxy_process import ProxyProcess
from scripted_engine import Asked, ScriptedEngine

pytestmark = pytest.mark.asyncio(loop_scope="module")

COMPLETIONS, BODY = "/v1/completions", {"model": "m", "prompt": "Hi"}
PROXY_FLAGS = ("--node-ttl", "0.6")


async def hanging(asked: Asked) -> None:
    """As a stopped process: the connection is taken, and nothing comes."""
    await asked.gone.wait()


async def test_a_dead_engine_costs_no_request(proxy: ProxyProcess) -> None:
    async with ScriptedEngine("one") as one, ScriptedEngine("two") as two:
        await proxy.add(one)
        await proxy.add(two)
        await one.die()
        replies = [await proxy.post(COMPLETIONS, BODY) for _ in range(20)]
        assert {(status, reply["by"]) for status, reply in replies} == {(200, "two")}
        assert (await proxy.node(one))["up"] is False


async def test_an_engine_that_returns_is_used_again(proxy: ProxyProcess) -> None:
    async with ScriptedEngine("one") as one:
        await proxy.add(one)
        await one.die()
        await proxy.until(one, up=False)
        assert (await proxy.post(COMPLETIONS, BODY))[0] == 503
        async with ScriptedEngine("again", port=one.port) as again:
            began = time.monotonic()
            await proxy.until(again, up=True)
            assert time.monotonic() - began < 5
            assert (await proxy.post(COMPLETIONS, BODY))[1]["by"] == "again"


async def test_a_hung_engine_is_out_within_seconds_and_its_waiting_requests_go_elsewhere(proxy: ProxyProcess) -> None:
    async with ScriptedEngine("hung") as hung, ScriptedEngine("two") as two:
        await proxy.add(hung)
        hung.scripts |= {COMPLETIONS: hanging, "/health": hanging}
        asking = asyncio.create_task(proxy.post(COMPLETIONS, BODY))
        await hung.when_asked(COMPLETIONS)
        await proxy.add(two)
        assert (await asyncio.wait_for(asking, 4))[1]["by"] == "two"
        assert (await proxy.node(hung))["up"] is False
        hung.scripts.clear()
        await proxy.until(hung, up=True)


async def test_an_engine_too_busy_for_probes_stays_while_its_streams_go_on(proxy: ProxyProcess) -> None:
    stop = asyncio.Event()

    async def streaming(asked: Asked) -> None:
        asked.stream_head()
        while not stop.is_set():
            asked.event("x")
            await asyncio.sleep(0.02)
        asked.end()

    async with ScriptedEngine("busy") as busy:
        await proxy.add(busy)
        busy.scripts |= {COMPLETIONS: streaming, "/health": hanging}
        async with proxy.session.post(proxy.url + COMPLETIONS, json=BODY | {"stream": True}) as reply:
            await busy.when_asked("/health", times=6)
            assert (await proxy.node(busy))["up"] is True
            stop.set()
            assert b"[DONE]" in await reply.read()
        await proxy.until(busy, up=False)  # nothing speaks for it any more


async def test_an_engine_that_is_not_ready_gets_nothing(proxy: ProxyProcess) -> None:
    async def starting(asked: Asked) -> None:
        asked.reply(503, {"message": "starting"})

    async with ScriptedEngine("one") as one:
        one.scripts["/health"] = starting
        await proxy.add(one)
        await proxy.until(one, up=False)
        one.scripts.clear()
        await proxy.until(one, up=True)


async def test_an_engine_without_health_is_alive_all_the_same(proxy: ProxyProcess) -> None:
    async def unknown(asked: Asked) -> None:
        asked.reply(404, {})

    async with ScriptedEngine("one") as one:
        one.scripts["/health"] = unknown
        await proxy.add(one)
        await one.when_asked("/health", times=3)
        assert (await proxy.node(one))["up"] is True


async def test_three_failures_in_a_row_put_a_node_out(proxy: ProxyProcess) -> None:
    async def failing(asked: Asked) -> None:
        asked.reply(500, {"error": {}})

    async with ScriptedEngine("bad") as bad, ScriptedEngine("good") as good:
        bad.scripts |= {COMPLETIONS: failing, "/health": failing}
        good.scripts["/health"] = bad._health
        await proxy.add(good)
        await proxy.add(bad)
        await proxy.until(bad, up=False)
        for _ in range(10):
            assert (await proxy.post(COMPLETIONS, BODY))[1]["by"] == "good"


async def test_only_the_silent_dead_are_forgotten(proxy: ProxyProcess) -> None:
    async with ScriptedEngine("beating") as beating, ScriptedEngine("plain") as plain:
        await proxy.add(beating, incarnation="1")
        await proxy.add(plain)
    await proxy.until_true(lambda nodes: beating.url not in nodes, "/nodes/status")
    assert plain.url in (await proxy.get("/nodes/status"))[1]  # it never promised to say anything


async def test_an_engine_without_a_name_is_linked_anew_when_it_returns(proxy: ProxyProcess) -> None:
    async with ScriptedEngine("p") as prefill, ScriptedEngine("d") as decode:
        await proxy.add(prefill, "prefill")
        await proxy.add(decode, "decode")
        await decode.when_asked("/distserve/p2p_connect")
        await prefill.die()
        await proxy.until(prefill, up=False)
        async with ScriptedEngine("p", port=prefill.port) as again:
            await proxy.until(again, up=True)
            await again.when_asked("/distserve/p2p_connect")
            assert decode.requests("/distserve/p2p_drop_connect")
