"""Prefill and decode share a request: concurrently between engines of ours, in LMDeploy's order with others."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import NamedTuple

import pytest
import pytest_asyncio
from proxy_process import ProxyProcess, running_proxy
from scripted_engine import Asked, Script, ScriptedEngine

pytestmark = pytest.mark.asyncio(loop_scope="module")

COMPLETIONS, CHAT, FREE = "/v1/completions", "/v1/chat/completions", "/distserve/free_cache"
HANDOFF = "x-tandem-handoff"
BODY = {"model": "m", "prompt": "Hi", "max_tokens": 9}


class Two(NamedTuple):
    prefill: ScriptedEngine
    decode: ScriptedEngine


@pytest_asyncio.fixture(loop_scope="module")
async def ours(proxy: ProxyProcess) -> AsyncIterator[Two]:
    async with ScriptedEngine("p") as prefill, ScriptedEngine("d") as decode:
        await proxy.pair(prefill, decode)
        yield Two(prefill, decode)


@pytest_asyncio.fixture(loop_scope="module")
async def foreign(proxy: ProxyProcess) -> AsyncIterator[Two]:
    async with ScriptedEngine("p", ours=False) as prefill, ScriptedEngine("d", ours=False) as decode:
        await proxy.pair(prefill, decode)
        yield Two(prefill, decode)


async def waiting(asked: Asked) -> None:
    await asked.gone.wait()


def answering(status: int, value: object, *headers: str) -> Script:
    async def script(asked: Asked) -> None:
        asked.reply(status, value, *headers)

    return script


async def dying(asked: Asked) -> None:
    asked.cut()


def once_asked(other: ScriptedEngine, script: Script) -> Script:
    """`script` when `other` has the request too: an answer given before ends what the other has not read yet."""

    async def waiting_for_the_other(asked: Asked) -> None:
        await other.when_asked(asked.path)
        await script(asked)

    return waiting_for_the_other


# concurrently


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
async def test_both_get_the_same_bytes_and_a_header_that_names_the_other(
    proxy: ProxyProcess, ours: Two, path: str
) -> None:
    body = b'{"model":"m", "prompt":"Hi","messages":[], "seed":1.50}'
    ours.decode.scripts[path] = once_asked(ours.prefill, answering(200, {"by": "d"}))
    assert (await proxy.post(path, body))[1]["by"] == "d"
    give, take = ours.prefill.requests(path)[0], ours.decode.requests(path)[0]
    assert give.body == take.body == body
    given, taken = json.loads(give.headers[HANDOFF]), json.loads(take.headers[HANDOFF])
    assert given == {"type": "give", "session": given["session"], "peer": ours.decode.url}
    assert taken == {"type": "take", "session": given["session"], "peer": ours.prefill.url}
    assert 0 <= given["session"] < 2**53
    assert ours.prefill.requests(FREE) == ours.decode.requests(FREE) == []


async def test_sessions_differ(proxy: ProxyProcess, ours: Two) -> None:
    for _ in range(20):
        await proxy.post(COMPLETIONS, BODY)
    sessions = {json.loads(asked.headers[HANDOFF])["session"] for asked in ours.decode.requests(COMPLETIONS)}
    assert len(sessions) == 20


async def test_both_are_asked_at_once(proxy: ProxyProcess, ours: Two) -> None:
    ours.prefill.scripts[COMPLETIONS] = waiting
    ours.decode.scripts[COMPLETIONS] = once_asked(ours.prefill, answering(200, {"by": "d"}))
    assert (await proxy.post(COMPLETIONS, BODY))[1]["by"] == "d"  # decode's answer does not wait for prefill's
    await asyncio.wait_for(ours.prefill.requests(COMPLETIONS)[0].gone.wait(), 2)  # and ends it


async def test_the_stream_is_decodes(proxy: ProxyProcess, ours: Two) -> None:
    async with proxy.session.post(proxy.url + COMPLETIONS, json=BODY | {"stream": True}) as reply:
        assert (await reply.read()).count(b"data: ") == 4


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_is_gone_from_both(proxy: ProxyProcess, ours: Two, stream: bool) -> None:
    ours.prefill.scripts[COMPLETIONS] = ours.decode.scripts[COMPLETIONS] = waiting
    asking = asyncio.create_task(proxy.post(COMPLETIONS, BODY | {"stream": stream}))
    give, take = await ours.prefill.when_asked(COMPLETIONS), await ours.decode.when_asked(COMPLETIONS)
    asking.cancel()
    await asyncio.wait_for(asyncio.gather(give.gone.wait(), take.gone.wait()), 2)


async def test_what_prefill_holds_for_a_client_that_left_is_freed(proxy: ProxyProcess, ours: Two) -> None:
    ours.decode.scripts[COMPLETIONS] = waiting
    asking = asyncio.create_task(proxy.post(COMPLETIONS, BODY))
    give = await ours.prefill.when_asked(COMPLETIONS)
    await proxy.until(ours.prefill, unfinished=0)  # its part is done, its KV held
    asking.cancel()
    freed = (await ours.prefill.when_asked(FREE)).json
    session = json.loads(give.headers[HANDOFF])["session"]
    assert freed == {"remote_engine_id": ours.decode.url, "remote_session_id": session}


@pytest.mark.parametrize("failure", [dying, answering(500, {}), answering(503, {}), answering(409, {})])
async def test_when_prefill_fails_decode_is_told_to_do_without(proxy: ProxyProcess, ours: Two, failure: Script) -> None:
    told = asyncio.Event()

    async def free_cache(asked: Asked) -> None:
        asked.reply(200, {"status": "SUCCESS"})
        told.set()

    async def recomputing(asked: Asked) -> None:
        await told.wait()
        asked.reply(200, {"by": "d"})

    ours.prefill.scripts[COMPLETIONS] = failure
    ours.decode.scripts |= {FREE: free_cache, COMPLETIONS: recomputing}
    assert await asyncio.wait_for(proxy.post(COMPLETIONS, BODY), 5) == (200, {"by": "d"})
    session = json.loads(ours.decode.requests(COMPLETIONS)[0].headers[HANDOFF])["session"]
    expected = {"remote_engine_id": ours.prefill.url, "remote_session_id": session}
    assert ours.decode.requests(FREE)[0].json == expected


async def test_a_hand_off_that_decode_declines_is_no_failure(proxy: ProxyProcess, ours: Two) -> None:
    ours.prefill.scripts[COMPLETIONS] = answering(410, {})

    async def computing(asked: Asked) -> None:
        await proxy.until(ours.prefill, unfinished=0)
        asked.reply(200, {"by": "d"})

    ours.decode.scripts[COMPLETIONS] = computing
    assert await asyncio.wait_for(proxy.post(COMPLETIONS, BODY), 5) == (200, {"by": "d"})
    assert ours.decode.requests(FREE) == ours.prefill.requests(FREE) == []
    assert (await proxy.node(ours.prefill))["up"] is True


async def test_a_dead_prefill_costs_one_recomputation_and_no_error(proxy: ProxyProcess, ours: Two) -> None:
    told = asyncio.Event()

    async def free_cache(asked: Asked) -> None:
        asked.reply(200, {})
        told.set()

    async def recomputing(asked: Asked) -> None:
        if HANDOFF in asked.headers:
            await told.wait()
        asked.reply(200, {"by": "d"})

    ours.decode.scripts |= {FREE: free_cache, COMPLETIONS: recomputing}
    await ours.prefill.die()
    for _ in range(5):
        assert await asyncio.wait_for(proxy.post(COMPLETIONS, BODY), 5) == (200, {"by": "d"})
    shared = [asked for asked in ours.decode.requests(COMPLETIONS) if HANDOFF in asked.headers]
    assert len(shared) <= 1  # afterwards the dead node is known, and decode gets requests whole
    assert (await proxy.node(ours.prefill))["up"] is False


async def test_decode_hears_it_again_when_it_was_told_too_early(proxy: ProxyProcess, ours: Two) -> None:
    heard = asyncio.Event()

    async def free_cache(asked: Asked) -> None:
        asked.reply(200, {})
        if len(ours.decode.requests(FREE)) == 2:
            heard.set()

    async def recomputing(asked: Asked) -> None:
        await heard.wait()
        asked.reply(200, {"by": "d"})

    ours.prefill.scripts[COMPLETIONS] = dying
    ours.decode.scripts |= {FREE: free_cache, COMPLETIONS: recomputing}
    assert await asyncio.wait_for(proxy.post(COMPLETIONS, BODY), 5) == (200, {"by": "d"})


@pytest.mark.parametrize("status", [400, 404, 429])
async def test_decodes_refusal_is_the_answer_and_stops_prefill(proxy: ProxyProcess, ours: Two, status: int) -> None:
    ours.prefill.scripts[COMPLETIONS] = waiting
    refusing = answering(status, {"error": 1}, "Retry-After: 3")
    ours.decode.scripts[COMPLETIONS] = once_asked(ours.prefill, refusing)
    async with proxy.session.post(proxy.url + COMPLETIONS, json=BODY) as reply:
        assert (reply.status, reply.headers["Retry-After"]) == (status, "3")
    await asyncio.wait_for(ours.prefill.requests(COMPLETIONS)[0].gone.wait(), 2)


async def test_a_full_prefill_is_passed_on_with_its_retry_after(proxy: ProxyProcess, ours: Two) -> None:
    ours.prefill.scripts[COMPLETIONS] = once_asked(ours.decode, answering(429, {"error": 1}, "Retry-After: 3"))
    ours.decode.scripts[COMPLETIONS] = waiting
    async with proxy.session.post(proxy.url + COMPLETIONS, json=BODY) as reply:
        assert (reply.status, reply.headers["Retry-After"]) == (429, "3")
    await asyncio.wait_for(ours.decode.requests(COMPLETIONS)[0].gone.wait(), 2)


async def test_a_full_prefill_does_not_end_what_decode_has_begun_to_say(proxy: ProxyProcess, ours: Two) -> None:
    begun, refused = asyncio.Event(), asyncio.Event()

    async def full(asked: Asked) -> None:
        await begun.wait()
        asked.reply(429, {"error": 1})
        refused.set()

    async def streaming(asked: Asked) -> None:
        asked.stream_head()
        asked.event("first")
        await refused.wait()
        await proxy.until(ours.prefill, unfinished=0)
        asked.event("last")
        asked.end()

    ours.prefill.scripts[COMPLETIONS], ours.decode.scripts[COMPLETIONS] = full, streaming
    async with proxy.session.post(proxy.url + COMPLETIONS, json=BODY | {"stream": True}) as reply:
        said = await reply.content.readuntil(b"\n\n")
        begun.set()
        said += await asyncio.wait_for(reply.read(), 5)
    assert said.count(b"data: ") == 3


@pytest.mark.parametrize("failure", [dying, answering(500, {})])
async def test_another_decode_takes_over_under_a_new_session(proxy: ProxyProcess, ours: Two, failure: Script) -> None:
    async with ScriptedEngine("d2") as other:
        await proxy.add(other, "decode", "d-2")
        await proxy.post("/distserve/connection_warmup", {})
        ours.decode.scripts[COMPLETIONS] = failure
        while not ours.decode.requests(COMPLETIONS):
            assert (await proxy.post(COMPLETIONS, BODY))[1]["by"] == "d2"
        first = json.loads(ours.decode.requests(COMPLETIONS)[-1].headers[HANDOFF])
        second = json.loads(other.requests(COMPLETIONS)[-1].headers[HANDOFF])
        assert first["session"] != second["session"]


async def test_without_another_decode_prefill_answers_whole(proxy: ProxyProcess, ours: Two) -> None:
    ours.decode.scripts[COMPLETIONS] = dying
    assert (await proxy.post(COMPLETIONS, BODY))[1]["by"] == "p"
    assert HANDOFF not in ours.prefill.requests(COMPLETIONS)[-1].headers


async def test_other_routes_are_not_shared(proxy: ProxyProcess, ours: Two) -> None:
    ours.decode.scripts["/generate"] = answering(200, {"by": "d"})
    assert await proxy.post("/generate", BODY) == (200, {"by": "d"})
    assert HANDOFF not in ours.decode.requests("/generate")[0].headers
    assert ours.prefill.requests("/generate") == []


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_one_pool_alone_answers_whole_requests(proxy: ProxyProcess, role: str) -> None:
    async with ScriptedEngine("only") as engine:
        await proxy.add(engine, role)
        assert (await proxy.post(COMPLETIONS, BODY))[1]["by"] == "only"
        assert HANDOFF not in engine.requests(COMPLETIONS)[0].headers


async def test_an_unlinkable_pair_answers_all_the_same(proxy: ProxyProcess) -> None:
    async with ScriptedEngine("p") as prefill, ScriptedEngine("d") as decode:
        prefill.scripts["/distserve/p2p_connect"] = answering(200, {"status": 2})
        await proxy.add(prefill, "prefill", "p-1")
        await proxy.add(decode, "decode", "d-1")
        status, reply = await proxy.post("/distserve/connection_warmup", {})
        assert (status, reply["code"], reply["object"]) == (503, 503, "error")
        assert (await proxy.post(COMPLETIONS, BODY))[1]["by"] == "d"
        assert HANDOFF not in decode.requests(COMPLETIONS)[0].headers
        assert (await decode.when_asked("/distserve/p2p_drop_connect")).json == {
            "engine_id": decode.url,
            "remote_engine_id": prefill.url,
        }


# LMDeploy's order


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
async def test_prefill_first_then_decode_with_where_the_cache_is(proxy: ProxyProcess, foreign: Two, path: str) -> None:
    body = BODY | {"stream": True, "stream_options": {"include_usage": True}}
    async with proxy.session.post(proxy.url + path, json=body) as reply:
        assert b"[DONE]" in await reply.read()
    prefill, decode = foreign.prefill.requests(path)[0], foreign.decode.requests(path)[0]
    one = {"max_completion_tokens": 1} if path == CHAT else {}
    keep = {"max_tokens": 1, "stream": False, "with_cache": True, "preserve_cache": True}
    assert prefill.json == body | keep | one
    assert decode.json == body | {
        "migration_request": {
            "protocol": 2,
            "remote_engine_id": foreign.prefill.url,
            "remote_session_id": 77,
            "remote_token_id": 42,
            "remote_block_ids": [5, 6],
            "is_dummy_prefill": False,
        }
    }
    assert HANDOFF not in prefill.headers | decode.headers
    assert foreign.prefill.requests(FREE) == []  # decode frees it, engine to engine


@pytest.mark.parametrize("reply", [{"id": "chatcmpl-x", "remote_token_ids": [1]}, {"id": "-1"}, [], {"id": {}}])
async def test_an_answer_without_a_lease_makes_decode_compute(proxy: ProxyProcess, foreign: Two, reply: object) -> None:
    foreign.prefill.scripts[CHAT] = answering(200, reply)
    assert (await proxy.post(CHAT, BODY))[1]["by"] == "d"
    assert foreign.decode.requests(CHAT)[0].json == BODY


@pytest.mark.parametrize("more", [{"n": 2}, {"prompt": ["a", "b"]}])
async def test_several_answers_go_to_decode_whole(proxy: ProxyProcess, foreign: Two, more: dict[str, object]) -> None:
    assert (await proxy.post(COMPLETIONS, BODY | more))[1]["by"] == "d"
    assert foreign.prefill.requests(COMPLETIONS) == []


async def test_prefills_refusal_is_the_answer(proxy: ProxyProcess, foreign: Two) -> None:
    foreign.prefill.scripts[COMPLETIONS] = answering(400, {"error": "too long"})
    assert await proxy.post(COMPLETIONS, BODY | {"stream": True}) == (400, {"error": "too long"})
    assert foreign.decode.requests(COMPLETIONS) == []


async def test_a_dead_prefill_is_done_without(proxy: ProxyProcess, foreign: Two) -> None:
    await foreign.prefill.die()
    for _ in range(3):
        assert (await proxy.post(COMPLETIONS, BODY))[1]["by"] == "d"


@pytest.mark.parametrize("failure", [dying, answering(500, {}), answering(400, {})])
async def test_when_decode_fails_the_cache_is_freed(proxy: ProxyProcess, foreign: Two, failure: Script) -> None:
    foreign.decode.scripts[COMPLETIONS] = failure
    await proxy.post(COMPLETIONS, BODY)
    freed = (await foreign.prefill.when_asked(FREE)).json
    assert freed == {"remote_engine_id": foreign.decode.url, "remote_session_id": 77}


async def test_gc_frees_what_could_not_be_freed(proxy: ProxyProcess, foreign: Two) -> None:
    foreign.decode.scripts[COMPLETIONS] = dying
    foreign.prefill.scripts[FREE] = answering(500, {})
    await proxy.post(COMPLETIONS, BODY)
    await foreign.prefill.when_asked(FREE)
    status, reply = await proxy.post("/distserve/gc", {})
    assert (status, reply["code"]) == (503, 503)
    del foreign.prefill.scripts[FREE]
    assert await proxy.post("/distserve/gc", {}) == (200, {"SUCCESS": True})
    asked = len(foreign.prefill.requests(FREE))
    assert await proxy.post("/distserve/gc", {}) == (200, {"SUCCESS": True})
    assert len(foreign.prefill.requests(FREE)) == asked  # once is enough


async def test_a_flag_asks_for_lmdeploys_order_between_engines_of_ours() -> None:
    async with (
        running_proxy("--handoff", "sequential", "--migration-protocol", "TCP") as proxy,
        ScriptedEngine("p") as prefill,
        ScriptedEngine("d") as decode,
    ):
        await proxy.pair(prefill, decode)
        await proxy.post(COMPLETIONS, BODY)
        assert decode.requests(COMPLETIONS)[0].json["migration_request"]["protocol"] == 1


async def test_a_dummy_prefill_asks_decode_alone() -> None:
    async with running_proxy("--dummy-prefill") as proxy, ScriptedEngine("p") as prefill, ScriptedEngine("d") as decode:
        await proxy.pair(prefill, decode)
        assert (await proxy.post(COMPLETIONS, BODY))[1]["by"] == "d"
        assert decode.requests(COMPLETIONS)[0].json["migration_request"]["is_dummy_prefill"] is True
        assert prefill.requests(COMPLETIONS) == []
