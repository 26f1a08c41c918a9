"""The official client gets right answers: whole and streamed, one choice and many, with all that the shapes carry."""

from __future__ import annotations

import json
from typing import Any

import pytest

from engine.api.sampling import choice_seed
from engine.core import Delta, FinishReason, Request
from tests.unit.api_server import ids, serve
from tests.unit.fake_core import Script, says

EOS = 2
HI = [{"role": "user", "content": "Hi"}]
TEXT = "Grüße 👩‍👩‍👧‍👦!"


def greeting() -> Script:
    return says([*ids(TEXT), EOS], cached=3)


async def test_chat_whole() -> None:
    async with serve(greeting()) as server, server.openai() as client:
        answer = await client.chat.completions.create(model="smollm2", messages=HI)
        assert answer.id.startswith("chatcmpl-")
        assert answer.object == "chat.completion"
        assert answer.system_fingerprint
        choice = answer.choices[0]
        assert (choice.index, choice.message.role, choice.message.content) == (0, "assistant", TEXT)
        assert choice.finish_reason == "stop"
        prompt = server.core.requests[0].prompt
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == len(prompt)
        assert answer.usage.completion_tokens == len(ids(TEXT)) + 1
        assert answer.usage.total_tokens == len(prompt) + len(ids(TEXT)) + 1
        assert answer.usage.prompt_tokens_details is not None
        assert answer.usage.prompt_tokens_details.cached_tokens == 3


async def test_chat_stream_equals_whole_and_never_splits_a_character() -> None:
    async with serve(greeting()) as server, server.openai() as client:
        stream = await client.chat.completions.create(
            model="smollm2", messages=HI, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(texts) == TEXT
    assert not any("\ufffd" in text for text in texts)
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(ids(TEXT)) + 1
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


async def test_completion_stream_ends_with_done_and_counts_as_it_goes() -> None:
    async with serve(says([*ids("one two three"), EOS])) as server:
        body = {
            "prompt": "x",
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }
        async with server.http.post(server.url + "/v1/completions", json=body) as reply:
            assert reply.headers["Content-Type"].startswith("text/event-stream")
            events = (await reply.text()).split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks[:-1]) == "one two three"
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 2, 3, 4, 4]


async def test_length_is_said_when_the_answer_was_cut() -> None:
    async with serve(says(ids("a b c d e"))) as server:
        status, body = await server.post("/v1/completions", {"prompt": "x", "max_tokens": 2})
        assert status == 200
        assert body["choices"][0]["finish_reason"] == "length"
        assert server.core.requests[0].sampling.max_tokens == 2


@pytest.mark.parametrize("stream", [False, True])
async def test_prompts_times_choices_keep_their_index(stream: bool) -> None:
    def script(request: Request) -> list[Delta]:
        number = int(request.id.rsplit("-", 1)[1])
        tokens = ids(" ".join(["one", "two", "three", "four"][: number + 1]))
        return [Delta(request_id="", tokens=[token]) for token in tokens] + [
            Delta(request_id="", tokens=[EOS], finish_reason=FinishReason.STOP)
        ]

    async with serve(script) as server, server.openai() as client:
        texts, reasons = [""] * 4, [""] * 4
        answer: Any = await client.completions.create(
            model="smollm2", prompt=["first prompt", "second"], n=2, stream=stream, seed=7
        )
        chunks = [chunk async for chunk in answer] if stream else [answer]
        for choice in (choice for chunk in chunks for choice in chunk.choices):
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
        assert texts == ["one", "one two", "one two three", "one two three four"]
        assert reasons == ["stop"] * 4
        requests = sorted(server.core.requests, key=lambda request: request.id)
        assert [request.prompt for request in requests] == [ids("first prompt")] * 2 + [ids("second")] * 2
        assert [request.sampling.seed for request in requests] == [choice_seed(7, index) for index in range(4)]


async def test_a_prompt_counts_once_however_many_choices() -> None:
    async with serve(says([*ids("a"), EOS], cached=1)) as server:
        _, body = await server.post("/v1/completions", {"prompt": ["x y", "z"], "n": 3})
        assert body["usage"]["prompt_tokens"] == len(ids("x y")) + len(ids("z"))
        assert body["usage"]["completion_tokens"] == 12
        assert body["usage"]["prompt_tokens_details"] == {"cached_tokens": 2}


async def test_token_ids_are_a_prompt_too() -> None:
    async with serve(greeting()) as server:
        await server.post("/v1/completions", {"prompt": [5, 6, 7]})
        await server.post("/v1/completions", {"prompt": [[5], [6, 7]], "truncate_prompt_tokens": 1})
        assert [request.prompt for request in server.core.requests] == [[5, 6, 7], [5], [7]]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("include", "expected"), [(False, "Answer: 42"), (True, "Answer: 42\nUser:")])
async def test_a_stop_string_cuts_the_text_and_ends_the_request(stream: bool, include: bool, expected: str) -> None:
    tokens = ids("Answer: 42\nUser: next question")
    async with serve(says(tokens)) as server, server.openai() as client:
        answer: Any = await client.completions.create(
            model="smollm2",
            prompt="x",
            max_tokens=100,
            stop=["never", "\nUser:"],
            stream=stream,
            stream_options={"include_usage": True} if stream else None,
            extra_body={"include_stop_str_in_output": include},
        )
        chunks = [chunk async for chunk in answer] if stream else [answer]
        choices = [choice for chunk in chunks for choice in chunk.choices]
        assert "".join(choice.text for choice in choices) == expected
        assert choices[-1].finish_reason == "stop"
        assert chunks[-1].usage.completion_tokens == len(ids("Answer: 42\nUser:"))
        await server.core.until_idle()
        assert server.core.aborted == [server.core.requests[0].id]


async def test_stop_strings_wait_for_min_tokens() -> None:
    async with serve(says(ids("a b a b a b"))) as server:
        _, body = await server.post("/v1/completions", {"prompt": "x", "stop": " b", "min_tokens": 3})
        assert body["choices"][0]["text"] == "a b a"


async def test_a_stop_token_is_counted_but_not_shown() -> None:
    tokens = [*ids("yes"), *ids("!")]
    async with serve(says(tokens)) as server:
        body = {"prompt": "x", "stop_token_ids": ids("!")}
        _, hidden = await server.post("/v1/completions", body)
        _, shown = await server.post("/v1/completions", body | {"include_stop_str_in_output": True})
        assert (hidden["choices"][0]["text"], hidden["usage"]["completion_tokens"]) == ("yes", 2)
        assert shown["choices"][0]["text"] == "yes!"
        assert server.core.requests[0].sampling.stop_token_ids == (EOS, *ids("!"))


async def test_chat_logprobs() -> None:
    tokens = ids("🧿")
    async with serve(says(tokens)) as server, server.openai() as client:
        answer = await client.chat.completions.create(
            model="smollm2", messages=HI, logprobs=True, top_logprobs=2, max_tokens=50
        )
        assert answer.choices[0].logprobs is not None
        content = answer.choices[0].logprobs.content
        assert content is not None
        assert bytes(byte for entry in content for byte in entry.bytes or []).decode() == "🧿"
        assert [len(entry.top_logprobs) for entry in content] == [2] * len(tokens)
        assert content[0].logprob == -0.5


@pytest.mark.parametrize("stream", [False, True])
async def test_completion_logprobs(stream: bool) -> None:
    tokens = ids("héllo there")
    async with serve(says(tokens)) as server, server.openai() as client:
        answer: Any = await client.completions.create(model="smollm2", prompt="x", logprobs=2, stream=stream)
        chunks = [chunk async for chunk in answer] if stream else [answer]
        parts = [choice.logprobs for chunk in chunks for choice in chunk.choices if choice.logprobs]
        texts = [token for part in parts for token in part.tokens]
        offsets = [offset for part in parts for offset in part.text_offset]
        assert len(texts) == len(tokens)
        assert "".join(texts) == "héllo there"
        assert [texts[i] for i in range(len(texts))] == [
            "héllo there"[a:b] for a, b in zip(offsets, [*offsets[1:], None], strict=True)
        ]
        assert all(texts[0] in part.top_logprobs[0] for part in parts[:1])


async def test_echo_and_token_ids() -> None:
    async with serve(says([*ids(" there"), EOS])) as server:
        body = {"prompt": "hello", "echo": True, "return_token_ids": True}
        _, whole = await server.post("/v1/completions", body)
        choice = whole["choices"][0]
        assert choice["text"] == "hello there"
        assert choice["prompt_token_ids"] == ids("hello")
        assert choice["token_ids"] == [*ids(" there"), EOS]
        async with server.http.post(server.url + "/v1/completions", json=body | {"stream": True}) as reply:
            text = await reply.text()
        chunks = [json.loads(line[6:])["choices"][0] for line in text.split("\n\n")[:-2]]
        assert "".join(chunk["text"] for chunk in chunks) == "hello there"
        assert [token for chunk in chunks for token in chunk["token_ids"]] == [*ids(" there"), EOS]


async def test_content_parts_and_template_arguments() -> None:
    async with serve(greeting()) as server:
        parts = [{"type": "text", "text": "Hello"}, {"type": "text", "text": "there"}]
        await server.post("/v1/chat/completions", {"messages": [{"role": "user", "content": parts}]})
        await server.post("/v1/chat/completions", {"messages": "Hello\nthere"})
        first, second = server.core.requests
        assert first.prompt == second.prompt


async def test_all_that_lmdeploys_proxy_writes_out_is_taken() -> None:
    dumped = {
        "model": "smollm2",
        "messages": HI,
        "temperature": 0.7,
        "top_p": 1.0,
        "top_k": 40,
        "tools": None,
        "tool_choice": "none",
        "parallel_tool_calls": None,
        "logprobs": False,
        "top_logprobs": None,
        "n": 1,
        "logit_bias": None,
        "max_completion_tokens": 1,
        "max_tokens": 1,
        "stop": None,
        "stream": False,
        "stream_options": {"include_usage": True},
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "user": None,
        "reasoning_effort": None,
        "response_format": None,
        "session_id": -1,
        "repetition_penalty": 1.0,
        "ignore_eos": False,
        "skip_special_tokens": True,
        "spaces_between_special_tokens": True,
        "include_stop_str_in_output": False,
        "seed": None,
        "min_new_tokens": None,
        "min_p": 0.0,
        "enable_thinking": None,
        "return_token_ids": False,
        "chat_template_kwargs": None,
        "do_preprocess": True,
        "mm_processor_kwargs": None,
        "with_cache": True,
        "preserve_cache": True,
        "migration_request": None,
    }
    async with serve(greeting()) as server:
        async with server.http.post(server.url + "/v1/chat/completions", json=dumped) as reply:
            assert reply.status == 200, await reply.text()
            assert "X-Tandem-Ignored-Fields" not in reply.headers
        sampling = server.core.requests[0].sampling
        assert (sampling.temperature, sampling.top_k, sampling.max_tokens) == (0.7, 40, 1)


async def test_unknown_fields_are_named_in_a_header() -> None:
    async with serve(greeting()) as server:
        body = {"prompt": "x", "flux": 1, "bad\r\nname": 2}
        async with server.http.post(server.url + "/v1/completions", json=body) as reply:
            assert reply.status == 200
            assert reply.headers["X-Tandem-Ignored-Fields"] == "flux"


async def test_the_request_id_comes_back() -> None:
    async with serve(greeting()) as server:
        for body, headers, expected in [
            ({"prompt": "x"}, {"X-Request-Id": "mine"}, "mine"),
            ({"prompt": "x", "request_id": "in-body"}, {}, "in-body"),
            ({"prompt": "x", "stream": True}, {"X-Request-Id": "streamed"}, "streamed"),
        ]:
            async with server.http.post(server.url + "/v1/completions", json=body, headers=headers) as reply:
                assert reply.headers["X-Request-Id"] == expected
        assert len({request.id for request in server.core.requests}) == 3


async def test_seeds_are_repeated_when_given_and_drawn_when_not() -> None:
    async with serve(greeting()) as server:
        for seed in (5, 5, None, None, -(2**63)):
            await server.post("/v1/completions", {"prompt": "x", "seed": seed})
        first, again, drawn, other, lowest = (request.sampling.seed for request in server.core.requests)
        assert first == again
        assert drawn != other
        assert 0 <= lowest < 2**63


async def test_models_and_administration() -> None:
    async with serve(greeting()) as server, server.openai() as client:
        models = (await client.models.list()).data
        assert [model.id for model in models] == ["smollm2"]
        assert models[0].model_dump()["max_model_len"] == 512
        assert (await client.models.retrieve("smollm2")).id == "smollm2"
        async with server.http.get(server.url + "/health") as reply:
            assert reply.status == 200
        async with server.http.get(server.url + "/openapi.json") as reply:
            described = await reply.json()
            assert "ChatRequest" in described["components"]["schemas"]
        async with server.http.get(server.url + "/docs") as reply:
            page = await reply.text()
            assert "/v1/chat/completions" in page
            assert "http://" not in page
            assert "https://" not in page
        server.core.alive = False
        async with server.http.get(server.url + "/health") as reply:
            assert reply.status == 503


async def test_metrics_show_the_core_and_the_requests() -> None:
    async with serve(greeting()) as server:
        await server.post("/v1/completions", {"prompt": "x"})
        await server.post("/v1/completions", {"prompt": ""})
        async with server.http.get(server.url + "/nowhere/at/all") as reply:
            assert reply.status == 404
        async with server.http.get(server.url + "/metrics") as reply:
            lines = (await reply.text()).splitlines()
    assert 'tandem_engine_http_requests_total{route="/v1/completions",status="200"} 1.0' in lines
    assert 'tandem_engine_http_requests_total{route="/v1/completions",status="400"} 1.0' in lines
    assert 'tandem_engine_http_requests_total{route="unknown",status="404"} 1.0' in lines
    assert "tandem_engine_requests_running 3.0" in lines
    assert "tandem_engine_time_to_first_token_seconds_count 1.0" in lines
