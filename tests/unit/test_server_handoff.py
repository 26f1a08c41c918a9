"""Both ways to say that KV is to move: our header and LMDeploy's fields. What is malformed moves nothing."""

from __future__ import annotations

import json
from typing import Any

import pytest

from engine.api.sampling import choice_seed
from engine.core import Give, Take
from tests.unit.api_server import ApiServer, ids, serve
from tests.unit.fake_core import says

EOS = 2
ANSWER = says([*ids("one two"), EOS], cached=4)
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HEADER = "X-Tandem-Handoff"
PEER = "http://127.0.0.1:1"
MIGRATION = {
    "protocol": 2,
    "remote_engine_id": PEER,
    "remote_session_id": 7,
    "remote_token_id": 42,
    "remote_block_ids": [5, 6],
    "is_dummy_prefill": False,
}


@pytest.fixture
async def server() -> Any:
    async with serve(ANSWER) as server:
        yield server


def header(kind: str, session: int = 123) -> str:
    return json.dumps({"type": kind, "session": session, "peer": PEER})


async def test_a_give_answers_whole_with_what_it_holds(server: ApiServer) -> None:
    body = {"prompt": "x", "max_tokens": 50, "stream": True, "stream_options": {"include_usage": True}}
    status, reply = await server.post(TEXT, body, **{HEADER: header("give")})
    assert status == 200
    assert reply["id"] == "123"
    assert reply["cache_block_ids"] == [1, 2]
    assert reply["remote_token_ids"] == ids("one")
    assert reply["usage"]["prompt_tokens_details"] == {"cached_tokens": 4}
    request = server.core.requests[0]
    assert request.handoff == Give(session=123, index=0, peer=PEER)
    assert request.sampling.max_tokens == 1


async def test_a_take_answers_as_the_client_asked(server: ApiServer) -> None:
    body = {"messages": "x", "stream": True}
    async with server.http.post(server.url + CHAT, json=body, headers={HEADER: header("take")}) as reply:
        assert (await reply.text()).endswith("data: [DONE]\n\n")
    assert server.core.requests[0].handoff == Take(session=123, peer=PEER, index=0)


async def test_each_prompt_and_choice_is_a_sub_request_of_the_session(server: ApiServer) -> None:
    body = {"prompt": ["x", "y"], "n": 2}
    _, reply = await server.post(TEXT, body, **{HEADER: header("give")})
    await server.post(TEXT, body, **{HEADER: header("take")})
    gives = [request.handoff for request in server.core.requests[:4]]
    takes = [request.handoff for request in server.core.requests[4:]]
    assert gives == [Give(session=123, index=index, peer=PEER) for index in range(4)]
    assert takes == [Take(session=123, index=index, peer=PEER) for index in range(4)]
    assert reply["cache_block_ids"] == [1, 2, 11, 12, 21, 22, 31, 32]
    assert len(reply["remote_token_ids"]) == 4


async def test_both_sides_draw_the_same_seeds(server: ApiServer) -> None:
    for kind in ("give", "take"):
        await server.post(TEXT, {"prompt": "x", "n": 2}, **{HEADER: header(kind, session=99)})
    seeds = [request.sampling.seed for request in server.core.requests]
    assert seeds == [choice_seed(99, 0), choice_seed(99, 1)] * 2


@pytest.mark.parametrize(("path", "prompt"), [(CHAT, {"messages": "x"}), (TEXT, {"prompt": "x"})])
async def test_lmdeploys_prefill_has_a_numeric_id(server: ApiServer, path: str, prompt: dict[str, str]) -> None:
    body = {**prompt, "max_tokens": 1, "stream": False, "with_cache": True, "preserve_cache": True}
    _, reply = await server.post(path, body)
    request = server.core.requests[0]
    assert isinstance(request.handoff, Give)
    assert request.handoff.peer is None
    assert int(reply["id"]) == request.handoff.session > 0
    assert request.handoff.session < 2**53
    assert (reply["cache_block_ids"], reply["remote_token_ids"]) == ([1, 2], ids("one"))


async def test_lmdeploys_completions_leave_the_users_length_in_place(server: ApiServer) -> None:
    body = {"prompt": "x", "max_tokens": 1, "max_completion_tokens": 40, "with_cache": True, "preserve_cache": True}
    await server.post(TEXT, body)
    assert server.core.requests[0].sampling.max_tokens == 1


@pytest.mark.parametrize(("path", "prompt"), [(CHAT, {"messages": "x"}), (TEXT, {"prompt": "x"})])
async def test_lmdeploys_decode_names_the_first_token(server: ApiServer, path: str, prompt: dict[str, str]) -> None:
    status, reply = await server.post(path, {**prompt, "migration_request": MIGRATION})
    assert status == 200
    assert "cache_block_ids" not in reply
    assert server.core.requests[0].handoff == Take(session=7, peer=PEER, index=0, first_token=42)


async def test_a_first_token_of_several_is_told_by_the_peer(server: ApiServer) -> None:
    await server.post(TEXT, {"prompt": "x", "n": 2, "migration_request": MIGRATION})
    assert [request.handoff for request in server.core.requests] == [
        Take(session=7, peer=PEER, index=0),
        Take(session=7, peer=PEER, index=1),
    ]


async def test_a_dummy_prefill_is_computed_here(server: ApiServer) -> None:
    migration = MIGRATION | {"is_dummy_prefill": True, "remote_engine_id": "", "remote_block_ids": []}
    status, _ = await server.post(TEXT, {"prompt": "x", "migration_request": migration})
    assert status == 200
    assert server.core.requests[0].handoff is None


@pytest.mark.parametrize(
    "value",
    [
        "",
        "{",
        "give",
        "[]",
        '{"session":1,"peer":"p"}',
        '{"type":"steal","session":1,"peer":"p"}',
        '{"type":"give","session":-1,"peer":"p"}',
        '{"type":"give","session":9007199254740992,"peer":"p"}',
        '{"type":"give","session":"1","peer":"p"}',
        '{"type":"take","session":1}',
        '{"type":"take","session":1,"peer":""}',
    ],
)
async def test_a_malformed_header_is_400_and_reaches_no_core(server: ApiServer, value: str) -> None:
    status, reply = await server.post(TEXT, {"prompt": "x"}, **{HEADER: value})
    assert status == 400
    assert HEADER in reply["error"]["message"]
    assert server.core.requests == []


@pytest.mark.parametrize(
    "change",
    [
        {"protocol": 0},
        {"protocol": "RDMA"},
        {"remote_engine_id": ""},
        {"remote_engine_id": 5},
        {"remote_session_id": -1},
        {"remote_session_id": 2**53},
        {"remote_session_id": "chatcmpl-1"},
        {"remote_token_id": None},
        {"remote_token_id": -1},
        {"remote_block_ids": [-1]},
        {"remote_block_ids": ["a"]},
        {"remote_block_ids": None},
    ],
)
async def test_a_malformed_migration_request_is_400_and_reaches_no_core(
    server: ApiServer, change: dict[str, Any]
) -> None:
    status, reply = await server.post(TEXT, {"prompt": "x", "migration_request": MIGRATION | change})
    assert status == 400
    assert "migration_request" in reply["error"]["message"]
    assert server.core.requests == []


async def test_a_header_that_is_not_text_is_400(server: ApiServer) -> None:
    body = b'{"prompt": "x"}'
    value = header("give").encode().replace(b"http", b"\xff\xfe")
    head = await server.raw(
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n%b: %b\r\nContent-Length: %d\r\n\r\n%b"
        % (HEADER.encode(), value, len(body), body)
    )
    assert head.startswith(b"HTTP/1.1 400 ")


async def test_a_request_moves_its_kv_in_one_way(server: ApiServer) -> None:
    for body in ({"preserve_cache": True, "migration_request": MIGRATION}, {"preserve_cache": True}):
        status, _ = await server.post(TEXT, {"prompt": "x", **body}, **{HEADER: header("give")})
        assert status == 400
    assert server.core.requests == []


async def test_only_the_cluster_key_may_ask_for_a_handoff() -> None:
    async with serve(ANSWER, api_key=("user",), cluster_key="cluster") as server:
        for body, headers in [
            ({}, {HEADER: header("give")}),
            ({"preserve_cache": True}, {}),
            ({"migration_request": MIGRATION}, {}),
        ]:
            status, reply = await server.post(TEXT, {"prompt": "x", **body}, Authorization="Bearer user", **headers)
            assert (status, reply["error"]["type"]) == (403, "invalid_request_error")
            assert server.core.requests == []
            status, _ = await server.post(TEXT, {"prompt": "x", **body}, Authorization="Bearer cluster", **headers)
            assert status == 200
            server.core.requests.clear()
