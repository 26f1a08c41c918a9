"""Every request ends in exactly one reply with a true status; bad input gets a clear one and reaches no core."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from engine.api.errors import InvalidRequest, Overloaded, Unavailable
from engine.core import Delta, FinishReason, Request
from engine.text.template import ChatTemplate
from engine.text.tokenizer import Tokenizer
from tests.unit.api_server import ApiServer, ids, serve
from tests.unit.fake_core import says

EOS = 2
USER = {"role": "user", "content": "Hi"}
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
ANSWER = says([*ids("one two three four"), EOS])

BAD_REQUESTS: list[tuple[str, dict[str, Any], str]] = [
    (TEXT, {}, "missing required field `prompt`"),
    (CHAT, {"messages": []}, "messages"),
    (CHAT, {"messages": [{"content": "no role"}]}, "missing required field `role`"),
    (CHAT, {"messages": [USER], "temperature": "hot"}, "temperature: Expected `float"),
    (CHAT, {"messages": [USER], "temperature": 2.1}, "temperature"),
    (CHAT, {"messages": [USER], "temperature": -0.1}, "temperature"),
    (CHAT, {"messages": [USER], "top_p": 0}, "top_p"),
    (CHAT, {"messages": [USER], "top_p": 1.5}, "top_p"),
    (CHAT, {"messages": [USER], "top_k": -2}, "top_k"),
    (CHAT, {"messages": [USER], "n": 0}, "n:"),
    (CHAT, {"messages": [USER], "n": 17}, "n:"),
    (CHAT, {"messages": [USER], "n": True}, "n: Expected `int"),
    (CHAT, {"messages": [USER], "top_logprobs": 3}, "needs logprobs"),
    (CHAT, {"messages": [USER], "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    (CHAT, {"messages": [USER], "max_tokens": 0}, "max_tokens"),
    (CHAT, {"messages": [USER], "max_tokens": -5}, "max_tokens"),
    (CHAT, {"messages": [USER], "max_tokens": 10**30}, "max_tokens"),
    (CHAT, {"messages": [USER], "max_tokens": 512}, "ask for at most"),
    (CHAT, {"messages": [USER], "min_tokens": 9, "max_tokens": 3}, "min_tokens is 9"),
    (CHAT, {"messages": [USER], "seed": 2**70}, "seed"),
    (CHAT, {"messages": [USER], "logit_bias": {"x": 1}}, "not a token id"),
    (CHAT, {"messages": [USER], "logit_bias": {"49152": 1}}, "outside the vocabulary"),
    (CHAT, {"messages": [USER], "logit_bias": {"5": 101}}, "logit_bias"),
    (CHAT, {"messages": [USER], "stop": ""}, "stop"),
    (CHAT, {"messages": [USER], "stop": ["ok", 7]}, "stop[1]"),
    (CHAT, {"messages": [USER], "stop_token_ids": [10**6]}, "outside the vocabulary"),
    (CHAT, {"messages": [USER], "tools": [{"type": "function"}]}, "tools is not supported"),
    (CHAT, {"messages": [USER], "tool_choice": "required"}, "tool_choice is not supported"),
    (CHAT, {"messages": [USER], "response_format": {"type": "json_object"}}, "response_format"),
    (CHAT, {"messages": [USER], "guided_regex": "a+"}, "guided_regex is not supported"),
    (CHAT, {"messages": [USER], "use_beam_search": True}, "use_beam_search is not supported"),
    (CHAT, {"messages": [USER], "best_of": 3}, "best_of"),
    (CHAT, {"messages": [USER], "prompt_logprobs": 0}, "prompt_logprobs is not supported"),
    (CHAT, {"messages": [USER], "do_preprocess": False}, "do_preprocess is not supported"),
    (CHAT, {"messages": [USER], "chat_template_kwargs": {"messages": []}}, "may not set messages"),
    (CHAT, {"messages": [USER], "request_id": "a\r\nSet-Cookie: x"}, "request_id"),
    (CHAT, {"messages": [USER], "request_id": "a\n"}, "request_id"),
    (CHAT, {"messages": [USER], "continue_final_message": True, "add_generation_prompt": True}, "exclude each other"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "reads text only"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "needs `text`"),
    (CHAT, {"messages": [{"role": "user", "content": "word " * 600}]}, "holds 512"),
    (TEXT, {"prompt": ""}, "empty"),
    (TEXT, {"prompt": []}, "prompt"),
    (TEXT, {"prompt": [[]]}, "empty"),
    (TEXT, {"prompt": ["ok", ""]}, "empty"),
    (TEXT, {"prompt": ["text", 5]}, "not a mixture"),
    (TEXT, {"prompt": [[5], "text"]}, "not a mixture"),
    (TEXT, {"prompt": [-1]}, "prompt[0]"),
    (TEXT, {"prompt": [49_152]}, "outside the vocabulary"),
    (TEXT, {"prompt": "x", "logprobs": 21}, "logprobs"),
    (TEXT, {"prompt": "x", "suffix": "end"}, "suffix is not supported"),
    (TEXT, {"prompt": "x", "echo": True, "logprobs": 1}, "echo with logprobs"),
    (TEXT, {"prompt": [5] * 512}, "has 512 tokens"),
    (TEXT, {"prompt": "a" * 500_000}, "at least"),
    (TEXT, {"prompt": ["x"] * 257}, "at most 256 prompts"),
    (TEXT, {"prompt": ["x"] * 40, "n": 16}, "make 640 sequences"),
    (TEXT, {"prompt": "x", "migration_request": {"protocol": 9}}, "migration_request.protocol"),
]


@pytest.fixture
async def server() -> Any:
    async with serve(ANSWER) as server:
        yield server


@pytest.mark.parametrize(("path", "body", "says_"), BAD_REQUESTS)
async def test_bad_requests_are_400_and_name_the_field(
    server: ApiServer, path: str, body: dict[str, Any], says_: str
) -> None:
    status, reply = await server.post(path, body)
    assert status == 400, reply
    error = reply["error"]
    assert says_ in error["message"]
    assert error["type"] == "invalid_request_error"
    assert set(error) == {"message", "type", "param", "code"}
    assert server.core.requests == []


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"text"',
        b'{"prompt": NaN}',
        b'{"prompt":"x","temperature":Infinity}',
        b'{"prompt":"x","temperature":1e999}',
        b'{"prompt":"\\ud800"}',
        b'{"prompt":"\xff\xfe"}',
        b'{"prompt":"x","user":' + b"[" * 100_000,
        b'{"prompt":"x","new":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"prompt":"x","seed":' + b"9" * 100_000 + b"}",
        b"\x00" * 100,
    ],
)
async def test_no_body_can_hurt(server: ApiServer, body: bytes) -> None:
    for path in (CHAT, TEXT):
        async with server.http.post(server.url + path, data=body) as reply:
            assert reply.status == 400
            assert (await reply.json())["error"]["message"]
    status, _ = await server.post(TEXT, {"prompt": "still here"})
    assert status == 200


@pytest.mark.parametrize(
    ("headers", "body", "expected"),
    [
        (b"Content-Encoding: gzip\r\nContent-Length: 5\r\n", b"hello", b"HTTP/1.1 400"),
        (b"Transfer-Encoding: chunked\r\n", b"ZZ\r\nhello\r\n", b"HTTP/1.0 400"),
        (b"Content-Length: -5\r\n", b"", b"HTTP/1.0 400"),
        (b"Expect: pudding\r\nContent-Length: 0\r\n", b"", b"HTTP/1.1 417"),
        (b"X: " + b"a" * 100_000 + b"\r\n", b"", b"HTTP/1.0 400"),
    ],
)
async def test_broken_http_is_one_reply_and_one_line_of_log(
    server: ApiServer, headers: bytes, body: bytes, expected: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    head = await server.raw(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n" + headers + b"\r\n" + body)
    assert head.startswith(expected)
    assert "Traceback" not in caplog.text
    status, _ = await server.post(TEXT, {"prompt": "still here"})
    assert status == 200


async def test_json_is_read_whatever_its_content_type_says(server: ApiServer) -> None:
    async with server.http.post(
        server.url + TEXT, data=b'{"prompt":"x"}', headers={"Content-Type": "text/plain"}
    ) as reply:
        assert reply.status == 200


@pytest.mark.parametrize(
    ("work", "path", "body"),
    [
        (Tokenizer._encode, TEXT, {"prompt": ["one two three " * 90] * 100}),
        (ChatTemplate.render, CHAT, {"messages": [USER] * 3000}),
    ],
)
async def test_much_that_is_small_is_read_beside_the_event_loop(
    server: ApiServer, work: Callable[..., Any], path: str, body: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = []

    def watched(*arguments: Any, **named: Any) -> Any:
        threads.append(threading.get_ident())
        return work(*arguments, **named)

    owner = {"_encode": Tokenizer, "render": ChatTemplate}[work.__name__]
    monkeypatch.setattr(owner, work.__name__, watched)
    await server.post(path, body)
    assert threads
    assert threading.get_ident() not in threads


async def test_a_token_that_only_the_tokenizer_has_is_400(server: ApiServer) -> None:
    server.core.model = msgspec.structs.replace(server.core.model, vocab_size=10)
    status, reply = await server.post(TEXT, {"prompt": "x"})
    assert (status, server.core.requests) == (400, [])
    assert "outside the vocabulary of 10" in reply["error"]["message"]


async def test_an_unknown_model_is_404(server: ApiServer) -> None:
    for path, rest in ((CHAT, {"messages": [USER]}), (TEXT, {"prompt": "x"})):
        status, reply = await server.post(path, {"model": "gpt-9", **rest})
        assert (status, reply["error"]["code"]) == (404, "model_not_found")


async def test_wrong_routes_and_methods_have_the_routes_shape(server: ApiServer) -> None:
    async with server.http.get(server.url + TEXT) as reply:
        assert (reply.status, reply.headers["Allow"]) == (405, "POST")
        assert "allowed: POST" in (await reply.json())["error"]["message"]
    async with server.http.get(server.url + "/v1/nothing") as reply:
        assert reply.status == 404
        assert (await reply.json())["error"]["type"] == "not_found_error"
    async with server.http.get(server.url + "/distserve/free_cache") as reply:
        assert reply.status == 405
        assert (await reply.json())["code"] == 405


async def test_a_body_too_large_is_refused_by_its_announcement() -> None:
    async with serve(ANSWER, max_body_bytes=1024) as server:
        head = await server.raw(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999\r\n\r\n"  # and no body at all
        )
        assert head.startswith(b"HTTP/1.1 413 ")


async def test_a_body_too_large_is_refused_while_it_comes() -> None:
    async with serve(ANSWER, max_body_bytes=1024) as server:
        chunk = b"400\r\n" + b"a" * 1024 + b"\r\n"
        head = await server.raw(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk * 2  # no end
        )
        assert head.startswith(b"HTTP/1.1 413 ")


async def test_overload_is_429_with_retry_after() -> None:
    async with serve(lambda request: [Overloaded("full", retry_after_s=7)]) as server:
        for stream in (False, True):
            async with server.http.post(server.url + TEXT, json={"prompt": "x", "stream": stream}) as reply:
                assert (reply.status, reply.headers["Retry-After"]) == (429, "7")
                assert (await reply.json())["error"]["code"] == "overloaded"


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        (Unavailable("the core died"), 503),
        (InvalidRequest("never fits"), 400),
        (ValueError("a bug"), 500),
        (Delta(request_id="", finish_reason=FinishReason.ERROR, error="cannot", error_status=409), 409),
        (Delta(request_id="", finish_reason=FinishReason.ABORT), 503),
    ],
)
@pytest.mark.parametrize("body", [{}, {"stream": True}, {"n": 2}, {"n": 2, "stream": True}])
async def test_a_failure_before_the_first_byte_has_its_true_status(
    failure: Exception | Delta, expected: int, body: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    async with serve(lambda request: [failure]) as server:
        async with server.http.post(
            server.url + TEXT, json={"prompt": "x", **body}, headers={"X-Request-Id": "lost"}
        ) as reply:
            text = await reply.text()
            assert reply.status == expected, text
        assert "Traceback" not in text
        assert "a bug" not in text
        if expected == 500:
            assert "lost" in text
            assert "request lost failed" in caplog.text
        await server.core.until_idle()


@pytest.mark.parametrize("n", [1, 2])
async def test_a_failure_after_the_first_byte_is_an_error_event_and_never_a_stop(n: int) -> None:
    def script(request: Request) -> list[Delta | Exception]:
        return [Delta(request_id="", tokens=ids("one")), Unavailable("the core died")]

    async with serve(script) as server:
        async with server.http.post(server.url + TEXT, json={"prompt": "x", "stream": True, "n": n}) as reply:
            assert reply.status == 200
            text = await reply.text()
        events = [json.loads(event.removeprefix("data: ")) for event in text.split("\n\n")[:-1]]
        assert events[-1]["error"]["message"] == "the core died"
        assert "[DONE]" not in text
        assert all(choice["finish_reason"] is None for event in events[:-1] for choice in event["choices"])
        await server.core.until_idle()


async def test_a_core_that_ends_in_silence_is_an_error() -> None:
    async with serve(lambda request: [Delta(request_id="", tokens=ids("one"))]) as server:
        status, reply = await server.post(TEXT, {"prompt": "x"})
        assert status == 503
        assert "in silence" in reply["error"]["message"]


async def first_delta_seen(server: ApiServer, count: int) -> None:
    async with asyncio.timeout(5):
        while len(server.core.running) < count:  # noqa: ASYNC110
            await asyncio.sleep(0.001)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
async def test_a_client_that_goes_away_aborts_every_choice(stream: bool, n: int) -> None:
    async with serve(ANSWER) as server:
        server.core.gate = asyncio.Event()  # never set: the answer hangs after its first token
        body = json.dumps({"prompt": "x", "stream": stream, "n": n}).encode()
        _, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        await first_delta_seen(server, n)
        writer.close()
        await server.core.until_idle()
        assert sorted(server.core.aborted) == sorted(request.id for request in server.core.requests)
        async with server.http.get(server.url + "/metrics") as reply:
            assert 'route="/v1/completions",status="disconnected"} 1.0' in await reply.text()


async def test_one_failing_choice_aborts_the_others() -> None:
    def script(request: Request) -> list[Delta | Exception]:
        if request.id.endswith("-1"):
            return [Overloaded("full")]
        return [Delta(request_id="", tokens=ids("one"))] * 1000

    async with serve(script) as server:
        status, _ = await server.post(TEXT, {"prompt": "x", "n": 3})
        assert status == 429
        await server.core.until_idle()
        assert len(server.core.aborted) == 2


async def test_a_request_past_its_deadline_is_504(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.server.answering.WRITE_GRACE_S", 0.05)
    async with serve(ANSWER, request_timeout=0.05) as server:
        server.core.gate = asyncio.Event()
        status, reply = await server.post(TEXT, {"prompt": "x"})
        assert status == 504
        assert "deadline" in reply["error"]["message"]
        await server.core.until_idle()


@pytest.mark.parametrize("stream", [False, True])
async def test_tokens_leave_without_delay(server: ApiServer, stream: bool) -> None:
    await server.post_text(TEXT, {"prompt": "x", "stream": stream})
    assert server.no_delay == [1]


async def test_keys() -> None:
    keys = {"api_key": ("user-1", "user-2"), "cluster_key": "cluster"}
    async with serve(ANSWER, **keys) as server:
        for key, expected in [("user-2", 200), ("cluster", 200), ("other", 401), ("", 401), ("üser", 401)]:
            status, reply = await server.post(TEXT, {"prompt": "x"}, Authorization=f"Bearer {key}")
            assert status == expected, reply
        assert reply["error"]["type"] == "authentication_error"
        for key, expected in [("cluster", 200), ("user-1", 401)]:
            body = {"remote_engine_id": "http://p", "remote_session_id": 1}
            status, reply = await server.post("/distserve/free_cache", body, Authorization=f"Bearer {key}")
            assert status == expected, reply
        assert reply["code"] == 401
        async with server.http.get(server.url + "/health") as health:
            assert health.status == 200


async def test_terminate_is_refused_unless_allowed() -> None:
    async with serve(ANSWER) as server, server.http.post(server.url + "/terminate") as reply:
        assert reply.status == 403
        assert "--allow-terminate" in (await reply.json())["message"]
