"""OpenAI's official client, unmodified, through our proxy: every request is shared by a prefill and a decode engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack
from typing import Any

import openai
import pytest

from deploy.cluster import Keys
from tests.cluster.local_cluster import MODEL, LocalCluster

pytestmark = pytest.mark.cluster

KEYS = Keys(api=("a-user", "another-user"), cluster="the-cluster")
MAX_INFLIGHT = 4
MAX_BODY_BYTES = 65_536
MESSAGES: list[Any] = [
    {"role": "system", "content": [{"type": "text", "text": "You are brief."}]},
    {"role": "user", "content": "Tell me a long story about a king."},
]
CHAT: dict[str, Any] = {"model": MODEL, "messages": MESSAGES, "max_tokens": 16}
TEXT: dict[str, Any] = {"model": MODEL, "prompt": "The capital of France is", "max_tokens": 12}
ENDLESS: dict[str, Any] = {"max_tokens": 500, "extra_body": {"ignore_eos": True}}
GREEDY: dict[str, Any] = {"temperature": 0}


@pytest.fixture(scope="module")
def keyed_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    limits = ("--max-inflight", str(MAX_INFLIGHT), "--max-queue", "0", "--max-body-bytes", str(MAX_BODY_BYTES))
    with LocalCluster(tmp_path_factory.mktemp("openai"), keys=KEYS, proxy_flags=limits) as cluster:
        yield cluster


@pytest.fixture
def cluster(keyed_cluster: LocalCluster) -> Iterator[LocalCluster]:
    yield keyed_cluster
    keyed_cluster.assert_whole()


@pytest.fixture
def client(cluster: LocalCluster) -> Iterator[openai.OpenAI]:
    with cluster.client() as client:
        yield client


@pytest.fixture(scope="module", autouse=True)
def every_prompt_was_handed_over(keyed_cluster: LocalCluster) -> Iterator[None]:
    yield
    assert keyed_cluster.engine_metric("decode-1", "recomputed_tokens_total") == 0
    assert keyed_cluster.engine_metric("decode-1", "transferred_tokens_total") > 200


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).object == "model"


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(**CHAT, **GREEDY)
    (choice,) = answer.choices
    assert answer.id.startswith("chatcmpl-")
    assert (answer.object, answer.model, choice.index) == ("chat.completion", MODEL, 0)
    assert (choice.message.role, choice.finish_reason, choice.logprobs) == ("assistant", "length", None)
    assert choice.message.content
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 16
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 16


def test_a_chat_streamed_is_the_chat_whole(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(**CHAT, **GREEDY)
    chunks = list(client.chat.completions.create(**CHAT, **GREEDY, stream=True))
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert {chunk.usage for chunk in chunks} == {None}
    assert len(chunks) > 8, "the answer came in few pieces"


def test_the_clients_own_way_to_put_a_stream_together(client: openai.OpenAI) -> None:
    short: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 40}
    whole = client.chat.completions.create(**CHAT | short, **GREEDY)
    with client.chat.completions.stream(**CHAT | short, **GREEDY) as stream:
        stream.until_done()
        joined = stream.get_final_completion()
    assert joined.choices[0].message.content == whole.choices[0].message.content
    assert joined.choices[0].finish_reason == "stop"


def test_a_completion_streamed_is_the_completion_whole(client: openai.OpenAI) -> None:
    whole = client.completions.create(**TEXT, **GREEDY)
    assert whole.choices[0].text.startswith(" Paris")
    chunks = list(client.completions.create(**TEXT, **GREEDY, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason == "length"


@pytest.mark.parametrize("route", ["chat", "completions"])
def test_a_streams_usage_comes_last_when_it_is_asked_for(route: str, client: openai.OpenAI) -> None:
    create: Callable[..., Any] = client.chat.completions.create if route == "chat" else client.completions.create
    fields = CHAT if route == "chat" else TEXT
    whole = create(**fields, **GREEDY).usage
    *chunks, last = create(**fields, **GREEDY, stream=True, stream_options={"include_usage": True})
    assert last.choices == []
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (whole.prompt_tokens, whole.completion_tokens)
    assert {chunk.usage for chunk in chunks} == {None}


def test_usage_says_how_much_was_cached(client: openai.OpenAI) -> None:
    prompt = "Of a long text that is sent again only the end is computed again. " * 8
    usages = [client.completions.create(**TEXT | {"prompt": prompt}).usage for _ in range(2)]
    cached = [
        usage.prompt_tokens_details.cached_tokens or 0 for usage in usages if usage and usage.prompt_tokens_details
    ]
    assert usages[1] is not None
    assert cached[0] == 0
    assert usages[1].prompt_tokens - 16 <= cached[1] < usages[1].prompt_tokens


def test_several_choices_of_several_prompts(client: openai.OpenAI) -> None:
    prompts = ["The capital of France is", "Two and two make"]
    answer = client.completions.create(**TEXT | {"prompt": prompts}, **GREEDY, n=2)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    texts = [choice.text for choice in answer.choices]
    assert texts[0] == texts[1] != texts[2] == texts[3]
    assert texts[2] == client.completions.create(**TEXT | {"prompt": prompts[1]}, **GREEDY).choices[0].text


def test_choices_of_a_chat_differ_and_a_seed_repeats_them(client: openai.OpenAI) -> None:
    def said(seed: int) -> list[str | None]:
        answer = client.chat.completions.create(**CHAT, temperature=1.2, n=3, seed=seed)
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        return [choice.message.content for choice in answer.choices]

    assert said(1) == said(1) != said(2)
    assert len(set(said(1))) > 1


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_every_token_of_a_chat_has_its_logprobs(stream: bool, client: openai.OpenAI) -> None:
    """The first, which prefill has drawn, too."""
    reply: Any = client.chat.completions.create(**CHAT, **GREEDY, logprobs=True, top_logprobs=3, stream=stream)
    choices = [choice for part in (list(reply) if stream else [reply]) for choice in part.choices]
    tokens = [token for choice in choices if choice.logprobs for token in choice.logprobs.content]
    text = "".join((choice.delta if stream else choice.message).content or "" for choice in choices)
    assert len(tokens) == 16
    assert b"".join(bytes(token.bytes) for token in tokens).decode() == text
    for token in tokens:
        assert len(token.top_logprobs) == 3
        assert token.top_logprobs[0].token == token.token, "greedy draws the likeliest"
        assert 0 >= token.logprob == token.top_logprobs[0].logprob >= token.top_logprobs[1].logprob


def test_every_token_of_a_completion_has_its_logprobs(client: openai.OpenAI) -> None:
    (choice,) = client.completions.create(**TEXT, **GREEDY, logprobs=2).choices
    assert choice.logprobs is not None
    assert choice.logprobs.tokens is not None
    assert choice.logprobs.text_offset is not None
    assert "".join(choice.logprobs.tokens) == choice.text
    assert len(choice.logprobs.tokens) == len(choice.logprobs.token_logprobs or []) == 12
    assert choice.logprobs.text_offset == sorted(choice.logprobs.text_offset)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_stop_strings_end_the_answer_before_them(stream: bool, client: openai.OpenAI) -> None:
    text = client.completions.create(**TEXT, **GREEDY).choices[0].text
    stop = text[4:9]
    reply: Any = client.completions.create(**TEXT, **GREEDY, stop=["never said", stop], stream=stream)
    choices = [choice for part in (list(reply) if stream else [reply]) for choice in part.choices]
    assert "".join(choice.text for choice in choices) == text[: text.index(stop)]
    assert choices[-1].finish_reason == "stop"


def test_token_ids_are_a_prompt(client: openai.OpenAI) -> None:
    answer = client.completions.create(**TEXT | {"prompt": [504, 3575, 282, 4649, 314]}, **GREEDY)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 5


def test_the_request_id_that_the_client_shows_is_there(client: openai.OpenAI) -> None:
    assert client.completions.create(**TEXT)._request_id
    raw = client.completions.with_raw_response.create(**TEXT)
    assert raw.parse().choices[0].text
    assert raw.headers["content-type"] == "application/json"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": 5}, "temperature"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"prompt": []}, "prompt"),
        ({"stop": ""}, "stop"),
        ({"logprobs": 99}, "logprobs"),
        ({"suffix": "after"}, "suffix"),
        ({"extra_body": {"guided_regex": "a+"}}, "guided_regex"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_wrong_with_a_request_is_said(fields: dict[str, Any], param: str, client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        client.completions.create(**TEXT | fields)
    assert raised.value.type == "invalid_request_error"
    assert raised.value.param == param
    assert param in raised.value.message


def test_a_context_that_is_too_long_has_openais_code(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        client.completions.create(**TEXT | {"prompt": "word " * 10_000})
    assert raised.value.code == "context_length_exceeded"


def test_an_unknown_model_is_not_found(client: openai.OpenAI) -> None:
    for ask in (
        lambda: client.chat.completions.create(**CHAT | {"model": "gpt-4"}),
        lambda: client.models.retrieve("gpt-4"),
    ):
        with pytest.raises(openai.NotFoundError) as raised:
            ask()
        assert raised.value.code == "model_not_found"


def test_an_unknown_route_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.images.generate(prompt="a cat")


@pytest.mark.parametrize("key", ["nobody", "a-use", "a-user2"])
def test_a_wrong_key_is_an_authentication_error(key: str, client: openai.OpenAI) -> None:
    with client.with_options(api_key=key) as stranger, pytest.raises(openai.AuthenticationError) as raised:
        stranger.chat.completions.create(**CHAT)
    assert raised.value.code == "invalid_api_key"


@pytest.mark.parametrize("key", ["another-user", "the-cluster"])
def test_every_key_of_ours_opens(key: str, client: openai.OpenAI) -> None:
    with client.with_options(api_key=key) as other:
        assert other.completions.create(**TEXT).choices


MIGRATION = {
    "protocol": 2,
    "remote_engine_id": "http://127.0.0.1:1",
    "remote_session_id": 7,
    "remote_token_id": 42,
    "remote_block_ids": [5],
}


@pytest.mark.parametrize("handoff", [{"preserve_cache": True}, {"migration_request": MIGRATION}], ids=["give", "take"])
def test_a_user_may_not_ask_for_a_handoff(handoff: dict[str, Any], client: openai.OpenAI) -> None:
    """Towards the engines the proxy shows the cluster key, whoever asks."""
    with pytest.raises(openai.BadRequestError) as raised:
        client.completions.create(**TEXT, extra_body=handoff)
    assert raised.value.param == next(iter(handoff))
    assert client.completions.create(**TEXT, extra_body=dict.fromkeys(handoff)).choices, "null asks for nothing"


def test_a_body_that_is_too_long_is_413(client: openai.OpenAI) -> None:
    with pytest.raises(openai.APIStatusError) as raised:
        client.completions.create(**TEXT | {"prompt": "x" * MAX_BODY_BYTES})
    assert raised.value.status_code == 413


async def test_past_the_limit_it_is_a_rate_limit_error_that_says_when_to_retry(cluster: LocalCluster) -> None:
    async with cluster.async_client() as client, AsyncExitStack() as stack:
        for _ in range(MAX_INFLIGHT):
            stream = await client.completions.create(**TEXT | ENDLESS, stream=True)
            stack.push_async_callback(stream.close)
            await anext(stream)
        with pytest.raises(openai.RateLimitError) as raised:
            await client.completions.create(**TEXT)
        assert raised.value.type == "rate_limit_error"
        assert int(raised.value.response.headers["retry-after"]) >= 1


def test_the_clients_own_retries_get_through_when_there_is_room_again(cluster: LocalCluster) -> None:
    with cluster.client() as client, client.with_options(max_retries=8) as patient:
        streams = [
            client.completions.create(**TEXT | ENDLESS | {"max_tokens": 24}, stream=True) for _ in range(MAX_INFLIGHT)
        ]
        answer = patient.completions.create(**TEXT)
        assert answer.choices[0].text
        for stream in streams:
            assert list(stream)[-1].choices[0].finish_reason == "length"
