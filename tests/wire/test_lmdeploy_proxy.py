"""LMDeploy's unmodified proxy drives our engines: answers are those of our own proxy, and every block comes home."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import openai
import pytest

from deploy import probe
from tests.cluster.local_cluster import MODEL
from tests.cluster.second_proxy import SecondProxy
from tests.wire.lmdeploy_cluster import HybridProxy, LMDeployCluster, lmdeploy_python

pytestmark = pytest.mark.cluster

LEASE_S = 12
RELEASED_S = 8.0  # sooner than any lease expires: what is home by then was released, not forgotten
SEEN_S = 10.0
TEXTS = {
    "one token": "Hello",
    "a sentence": "The capital of France is",
    "some blocks": "Once upon a time there lived a king, who had a daughter, a dragon, and three wishes. " * 6,
}
MESSAGES: list[Any] = [
    {"role": "system", "content": "You are brief."},
    {"role": "user", "content": "Name three colours and the capital of France."},
]
# LMDeploy's proxy writes its own defaults into bodies that say nothing; which, depends on its version.
SAMPLED: dict[str, Any] = {"seed": 7, "temperature": 1.0, "extra_body": {"top_k": 50, "min_p": 0.0}}


class Said(NamedTuple):
    text: str
    tokens: list[str]
    logprobs: list[float]
    finish_reason: str


@pytest.fixture(scope="module")
def python() -> str:
    return lmdeploy_python()


@pytest.fixture(scope="module")
def lmdeploy(python: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LMDeployCluster]:
    flags = ("--lease-seconds", str(LEASE_S))
    with LMDeployCluster(tmp_path_factory.mktemp("lmdeploy"), python, flags) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def hybrid(python: str, lmdeploy: LMDeployCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HybridProxy]:
    with HybridProxy(tmp_path_factory.mktemp("hybrid"), python) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def ours(lmdeploy: LMDeployCluster) -> Iterator[openai.OpenAI]:
    """Our own proxy in front of the same two engines."""
    with SecondProxy(lmdeploy) as proxy, proxy.client() as client:
        yield client


@pytest.fixture
def cluster(lmdeploy: LMDeployCluster) -> Iterator[LMDeployCluster]:
    yield lmdeploy
    lmdeploy.assert_whole(RELEASED_S)


@pytest.fixture
def client(cluster: LMDeployCluster) -> Iterator[openai.OpenAI]:
    with cluster.client() as client:
        yield client


def until(holds: Callable[[], bool], what: str, deadline_s: float = SEEN_S) -> None:
    deadline = time.monotonic() + deadline_s
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


def nodes(url: str) -> dict[str, Any]:
    return probe.nodes(url, None)


def post(url: str, path: str, body: dict[str, Any]) -> Any:
    return json.loads(probe.ask(f"{url}{path}", body, deadline_s=30))


def complete(client: openai.OpenAI, prompt: Any, stream: bool, **more: Any) -> Said:
    fields: dict[str, Any] = {"model": MODEL, "prompt": prompt, "max_tokens": 12, "temperature": 0, "logprobs": 1}
    reply: Any = client.completions.create(**fields | more, stream=stream)
    parts = list(reply) if stream else [reply]
    choices = [choice for part in parts for choice in part.choices]
    text = "".join(choice.text for choice in choices)
    tokens = [token for choice in choices if choice.logprobs for token in choice.logprobs.tokens]
    logprobs = [value for choice in choices if choice.logprobs for value in choice.logprobs.token_logprobs]
    return Said(text, tokens, logprobs, choices[-1].finish_reason)


def chat(client: openai.OpenAI, stream: bool, **more: Any) -> Said:
    fields: dict[str, Any] = {"model": MODEL, "messages": MESSAGES, "max_tokens": 12, "temperature": 0}
    reply: Any = client.chat.completions.create(**fields | {"logprobs": True, "top_logprobs": 1} | more, stream=stream)
    choices = [choice for part in (list(reply) if stream else [reply]) for choice in part.choices]
    text = "".join((choice.delta if stream else choice.message).content or "" for choice in choices)
    tokens = [token for choice in choices if choice.logprobs for token in choice.logprobs.content]
    return Said(text, [it.token for it in tokens], [it.logprob for it in tokens], choices[-1].finish_reason)


def assert_equal(theirs: Said, ours: Said) -> None:
    """Token for token; the same KV may be multiplied in other batches."""
    assert theirs._replace(logprobs=[]) == ours._replace(logprobs=[])
    assert theirs.logprobs == pytest.approx(ours.logprobs, abs=1e-3)
    assert len(theirs.logprobs) == len(theirs.tokens) > 0


def test_engines_register_and_stay_linked_through_their_heartbeats(
    cluster: LMDeployCluster, client: openai.OpenAI
) -> None:
    """A repeated /nodes/add makes that proxy drop a decode engine's links, with a request between two of its steps."""
    known = nodes(cluster.proxy_url)
    assert {url: status["role"] for url, status in known.items()} == {
        cluster.url("prefill-1"): 2,
        cluster.url("decode-1"): 3,
    }
    assert all(status["models"] == [MODEL] for status in known.values())
    until(lambda: cluster.log("proxy").count("GET /nodes/status") > 8, "the engines do not heartbeat")
    complete(client, "Still there?", stream=False)
    assert cluster.log("proxy").count("POST /nodes/add") == 2
    assert cluster.log("decode-1").count("reading from") == 1


def test_connection_warmup(cluster: LMDeployCluster) -> None:
    assert post(cluster.proxy_url, "/distserve/connection_warmup", {}) == {"SUCCESS": True}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("name", TEXTS)
def test_completions_are_those_of_our_own_proxy(
    name: str, stream: bool, cluster: LMDeployCluster, client: openai.OpenAI, ours: openai.OpenAI
) -> None:
    prompt = f"{TEXTS[name]} {'And then' if stream else ''}".strip()
    transferred = cluster.engine_metric("decode-1", "transferred_tokens_total")
    recomputed = cluster.engine_metric("decode-1", "recomputed_tokens_total")
    first = complete(client, prompt, stream)
    until(
        lambda: cluster.engine_metric("decode-1", "transferred_tokens_total") > transferred,
        "decode has pulled nothing",
    )
    assert_equal(first, complete(ours, prompt, stream))
    assert_equal(complete(client, prompt, stream), first)  # again, over the connection that is there
    assert cluster.engine_metric("decode-1", "recomputed_tokens_total") == recomputed


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_chat_is_that_of_our_own_proxy(
    stream: bool, cluster: LMDeployCluster, client: openai.OpenAI, ours: openai.OpenAI
) -> None:
    """It fails in front of LMDeploy's own engines, whose ids of chats are no numbers."""
    first = chat(client, stream)
    assert_equal(first, chat(ours, stream))
    assert_equal(chat(client, stream), first)


def test_usage_comes_with_a_stream_that_asks_for_it(client: openai.OpenAI) -> None:
    chunks = list(
        client.completions.create(
            model=MODEL, prompt="Count", max_tokens=3, stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 3


@pytest.mark.parametrize("fields", [{"max_tokens": 1}, {"stop": "\n"}, SAMPLED], ids=["one token", "stop", "seed"])
def test_ends_and_seeds_are_kept(fields: dict[str, Any], client: openai.OpenAI, ours: openai.OpenAI) -> None:
    prompt = f"The capital of Spain is, given {fields}"
    assert_equal(complete(client, prompt, False, **fields), complete(ours, prompt, False, **fields))


async def test_many_at_once(cluster: LMDeployCluster) -> None:
    async with cluster.async_client() as client:
        fields: dict[str, Any] = {"model": MODEL, "max_tokens": 8, "temperature": 0}
        asked = [client.completions.create(**fields, prompt=f"{number} and one is") for number in range(16)]
        answers = await asyncio.gather(*asked)
        again = await client.completions.create(**fields, prompt="11 and one is")
    assert [answer.usage.completion_tokens for answer in answers if answer.usage] == [8] * 16
    assert answers[11].choices[0].text == again.choices[0].text


def test_a_client_that_leaves_its_stream_leaves_no_block(client: openai.OpenAI) -> None:
    stream = client.completions.create(model=MODEL, prompt="Tell me everything", max_tokens=1000, stream=True)
    assert next(stream).choices[0].text
    stream.close()


def test_a_prefill_that_nobody_fetches_is_freed_by_itself(lmdeploy: LMDeployCluster) -> None:
    """As when that proxy dies between its two calls."""
    body = {"model": MODEL, "prompt": "Nobody comes", "max_tokens": 1, "with_cache": True, "preserve_cache": True}
    reply = post(lmdeploy.url("prefill-1"), "/v1/completions", body)
    assert reply["id"].isdigit()
    assert len(reply["cache_block_ids"]) == 1
    until(lambda: not lmdeploy.is_whole("prefill-1"), "nothing was held")
    lmdeploy.assert_whole(LEASE_S + SEEN_S)


def test_a_restarted_prefill_engine_costs_no_answer(lmdeploy: LMDeployCluster, ours: openai.OpenAI) -> None:
    """That proxy goes on with the link of the one before: decode computes prompts itself until it is paired anew."""
    decode = lmdeploy.url("decode-1")
    lmdeploy.kill("prefill-1")
    lmdeploy.revive()
    transferred = lmdeploy.engine_metric("decode-1", "transferred_tokens_total")
    with lmdeploy.client() as client:
        assert_equal(complete(client, "After a restart", stream=True), complete(ours, "After a restart", stream=True))
        post(lmdeploy.proxy_url, "/nodes/remove", {"url": decode})
        until(lambda: decode in nodes(lmdeploy.proxy_url), "the engine did not register again")
        complete(client, "After another introduction", stream=False)
    until(
        lambda: lmdeploy.engine_metric("decode-1", "transferred_tokens_total") > transferred,
        "decode has pulled nothing",
    )
    lmdeploy.assert_whole(LEASE_S + SEEN_S)  # what was prefilled in vain is left to expire


def test_a_removed_decode_engine_comes_back_by_itself(
    cluster: LMDeployCluster, client: openai.OpenAI, ours: openai.OpenAI
) -> None:
    decode = cluster.url("decode-1")
    assert post(cluster.proxy_url, "/nodes/remove", {"url": decode}) == "Deleted successfully"
    until(lambda: decode in nodes(cluster.proxy_url), "the engine did not register again")
    prompt = "After a removal"
    assert_equal(complete(client, prompt, stream=False), complete(ours, prompt, stream=False))


def test_hybrid(cluster: LMDeployCluster, hybrid: HybridProxy, ours: openai.OpenAI) -> None:
    """Added by hand, and asked for its models."""
    url = cluster.url("decode-1")
    assert post(hybrid.url, "/nodes/add", {"url": url}) == "Added successfully"
    assert nodes(hybrid.url)[url]["models"] == [MODEL]
    with hybrid.client() as client:
        assert [model.id for model in client.models.list()] == [MODEL]
        for stream in (False, True):
            assert_equal(complete(client, "Alone", stream), complete(ours, "Alone", stream))
            assert_equal(chat(client, stream, max_tokens=6), chat(ours, stream, max_tokens=6))
    assert post(hybrid.url, "/nodes/remove", {"url": url}) == "Deleted successfully"
    assert nodes(hybrid.url) == {}
