"""However a prompt travels, the answer is the same: prefill and decode apart, one engine alone, transformers itself."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import openai
import pytest

from tests.cluster.answers import Answer, complete
from tests.cluster.local_cluster import LocalCluster
from tests.cluster.prompts import fresh_prompt, prompt_of
from tests.cluster.reference import Reference
from tests.cluster.second_proxy import SecondProxy

pytestmark = pytest.mark.cluster

BLOCK = 16
LENGTHS = (1, BLOCK - 1, BLOCK, BLOCK + 1, 2000)
WAYS = ("hybrid", "shm", "tcp", "shm, sequential", "tcp, sequential")
DISAGGREGATED = WAYS[1:]
LONGEST_SEQUENTIAL = 400  # the order changes nothing within a prompt: no need to compute 2,000 tokens again
COUNT = 8  # tokens of an answer
EOS = 2
FIGURES_S = 5.0  # for an engine's figures to show what it has done

TEXT = "Once upon a time, in a land far away, there lived a king who"
MESSAGES: list[openai.types.chat.ChatCompletionMessageParam] = [
    {"role": "system", "content": "You are brief."},
    {"role": "user", "content": "Name three colours and the capital of France."},
]
SAMPLED: dict[str, Any] = {
    "greedy": False,
    "temperature": 1.0,
    "top_p": 0.9,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.3,
    "repetition_penalty": 1.1,
    "seed": 20,
    "n": 2,
    "logprobs": 3,
}


@dataclass(frozen=True)
class Way:
    """How requests travel to be answered."""

    name: str
    client: Callable[[], openai.OpenAI]
    decode: Callable[[str], float] | None  # a figure of the decode engine; None: nobody hands over
    sequential: SecondProxy | None = None  # the proxy that lets prefill end before decode begins

    def prompt(self, length: int) -> list[int]:
        """One that this way's engines have not cached: both orders share their engines."""
        return prompt_of(length, "sequential" if "sequential" in self.name else "")


@pytest.fixture(scope="module")
def ways(shared_cluster: LocalCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Way]]:
    directory = tmp_path_factory.mktemp
    with (
        LocalCluster(directory("hybrid"), prefill=0, decode=0, hybrid=1) as hybrid,
        LocalCluster(directory("tcp"), engine_flags=("--require-transport", "tcp")) as tcp,
        SecondProxy(shared_cluster, "--handoff", "sequential") as shm_sequential,
        SecondProxy(tcp, "--handoff", "sequential") as tcp_sequential,
    ):
        yield {
            "hybrid": Way("hybrid", hybrid.client, None),
            "shm": Way("shm", shared_cluster.client, lambda figure: shared_cluster.engine_metric("decode-1", figure)),
            "tcp": Way("tcp", tcp.client, lambda figure: tcp.engine_metric("decode-1", figure)),
            "shm, sequential": Way(
                "shm, sequential",
                shm_sequential.client,
                lambda figure: shared_cluster.engine_metric("decode-1", figure),
                shm_sequential,
            ),
            "tcp, sequential": Way(
                "tcp, sequential",
                tcp_sequential.client,
                lambda figure: tcp.engine_metric("decode-1", figure),
                tcp_sequential,
            ),
        }
        tcp.assert_whole()
        hybrid.assert_whole()


@pytest.fixture(params=DISAGGREGATED)
def way(request: pytest.FixtureRequest, ways: dict[str, Way], cluster: LocalCluster) -> Way:
    """Each way through two engines. `cluster` sees to it that no block is left."""
    return ways[request.param]


@pytest.fixture
def hybrid(ways: dict[str, Way]) -> Way:
    return ways["hybrid"]


@pytest.fixture(scope="module")
def chat_of_one_engine(ways: dict[str, Way]) -> tuple[str, openai.types.CompletionUsage]:
    return _chat(ways["hybrid"])


@pytest.fixture(scope="module")
def expected() -> Callable[[list[int]], list[int]]:
    """What transformers says; asked once for each prompt."""
    reference, known = Reference(), dict[tuple[int, ...], list[int]]()

    def greedy(prompt: list[int]) -> list[int]:
        if tuple(prompt) not in known:
            known[tuple(prompt)] = reference.greedy(prompt, COUNT)
        return known[tuple(prompt)]

    return greedy


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", WAYS)
def test_greedy_tokens_are_those_of_transformers(
    name: str, length: int, ways: dict[str, Way], expected: Callable[[list[int]], list[int]], cluster: LocalCluster
) -> None:
    way = ways[name]
    prompt = way.prompt(min(length, LONGEST_SEQUENTIAL) if "sequential" in name else length)
    moved, recomputed = _figures(way)
    in_turn = way.sequential.handoffs("sequential") if way.sequential else 0
    answer = complete(way.client(), prompt, max_tokens=COUNT, ignore_eos=True)
    assert answer.token_ids == expected(prompt)
    assert (answer.prompt_tokens, answer.completion_tokens) == (len(prompt), COUNT)
    assert answer.finish_reason == "length"
    if way.decode is not None:
        _wait_for(lambda: _figures(way) == (moved + len(prompt), recomputed))
    if way.sequential is not None:
        assert way.sequential.handoffs("sequential") == in_turn + 1


def test_what_repeats_is_drafted_and_stays_what_transformers_says(
    way: Way, expected: Callable[[list[int]], list[int]]
) -> None:
    prompt = way.prompt(12) * 5
    assert way.decode is not None
    before = way.decode("accepted_tokens_total")
    answer = complete(way.client(), prompt, max_tokens=COUNT, ignore_eos=True)
    assert answer.token_ids == expected(prompt)
    _wait_for(lambda: way.decode("accepted_tokens_total") > before)


def test_one_token_is_the_first_token(way: Way, hybrid: Way) -> None:
    prompt = fresh_prompt(20)
    expected = complete(hybrid.client(), prompt, max_tokens=1)
    assert complete(way.client(), prompt, max_tokens=1) == expected
    assert expected.completion_tokens == 1


def test_an_end_as_first_token_ends_the_answer(way: Way) -> None:
    answer = complete(way.client(), fresh_prompt(20), max_tokens=COUNT, logit_bias={EOS: 100})
    assert (answer.text, answer.token_ids, answer.finish_reason) == ("", [EOS], "stop")
    assert answer.completion_tokens == 1


def test_an_end_that_is_to_be_ignored_ends_nothing(way: Way) -> None:
    answer = complete(way.client(), fresh_prompt(20), max_tokens=4, logit_bias={EOS: 100}, ignore_eos=True)
    assert (answer.token_ids, answer.finish_reason) == ([EOS] * 4, "length")


def test_seeded_sampling_draws_the_same_tokens(way: Way, hybrid: Way) -> None:
    prompt = fresh_prompt(40)
    expected = complete(hybrid.client(), prompt, max_tokens=12, **SAMPLED)
    found = complete(way.client(), prompt, max_tokens=12, **SAMPLED)
    first, second = expected.choices
    assert first.token_ids != second.token_ids
    _assert_equal(found, expected)


def test_the_first_token_has_its_logprobs(way: Way, hybrid: Way) -> None:
    prompt = fresh_prompt(33)
    expected = complete(hybrid.client(), prompt, max_tokens=3, logprobs=2)
    found = complete(way.client(), prompt, max_tokens=3, logprobs=2)
    assert len(found.choices[0].logprobs) == 3
    _assert_equal(found, expected)


@pytest.mark.parametrize("n", [1, 2])
def test_a_stream_says_what_the_whole_answer_says(n: int, way: Way) -> None:
    fields = {**SAMPLED, "n": n, "max_tokens": 16}
    prompt = fresh_prompt(24)
    whole = complete(way.client(), prompt, **fields)
    streamed = complete(way.client(), prompt, stream=True, **fields)
    whole.cached_tokens = streamed.cached_tokens  # the second time the prompt was known
    _assert_equal(streamed, whole)


def test_chat_is_the_same_streamed_whole_and_on_one_engine(
    way: Way, chat_of_one_engine: tuple[str, openai.types.CompletionUsage]
) -> None:
    expected, usage = chat_of_one_engine
    assert usage.completion_tokens == 24
    found, found_usage = _chat(way)
    assert (found, found_usage.prompt_tokens) == (expected, usage.prompt_tokens)
    assert _streamed_chat(way) == expected


def test_several_prompts_are_each_answered(way: Way, hybrid: Way) -> None:
    prompts = [fresh_prompt(length) for length in (3, 17, 48)]
    expected = complete(hybrid.client(), prompts, max_tokens=5, ignore_eos=True)
    found = complete(way.client(), prompts, max_tokens=5, ignore_eos=True)
    _assert_equal(found, expected)
    assert (found.prompt_tokens, found.completion_tokens) == (3 + 17 + 48, 15)


def test_echo_stands_before_the_answer(way: Way, hybrid: Way) -> None:
    expected = complete(hybrid.client(), TEXT, max_tokens=COUNT, echo=True)
    assert expected.text.startswith(TEXT)
    assert complete(way.client(), TEXT, max_tokens=COUNT, echo=True).text == expected.text


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_across_a_token_border_ends_the_answer_before_it(stream: bool, way: Way, hybrid: Way) -> None:
    unstopped = complete(hybrid.client(), TEXT, max_tokens=30, logprobs=0).choices[0]
    stop = unstopped.logprob_tokens[11][-1:] + unstopped.logprob_tokens[12][:2]
    assert stop in unstopped.text
    found = complete(way.client(), TEXT, max_tokens=30, stop=[stop], stream=stream)
    assert (found.text, found.finish_reason) == (unstopped.text[: unstopped.text.index(stop)], "stop")
    assert found.completion_tokens < 30


def test_a_second_turn_reuses_what_both_engines_know(way: Way) -> None:
    first_prompt = fresh_prompt(40)
    first = complete(way.client(), first_prompt, max_tokens=24, ignore_eos=True)
    assert first.cached_tokens == 0
    second_prompt = first_prompt + first.token_ids + fresh_prompt(10)
    moved, recomputed = _figures(way)
    second = complete(way.client(), second_prompt, max_tokens=2)
    # Prefill has seen the first prompt alone, decode also the answer but for the last token's KV: whole blocks of each.
    assert second.cached_tokens == 40 // BLOCK * BLOCK
    reused = (40 + 23) // BLOCK * BLOCK
    _wait_for(lambda: _figures(way) == (moved + len(second_prompt) - reused, recomputed))


def _assert_equal(found: Answer, expected: Answer) -> None:
    """Log-probabilities may differ by how float32 sums were ordered."""
    for ours, theirs in zip(found.choices, expected.choices, strict=True):
        assert (ours.token_ids, ours.text) == (theirs.token_ids, theirs.text)
        assert ours.finish_reason == theirs.finish_reason
        assert ours.logprob_tokens == theirs.logprob_tokens
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=2e-3)
    assert (found.prompt_tokens, found.completion_tokens) == (expected.prompt_tokens, expected.completion_tokens)
    assert found.cached_tokens == expected.cached_tokens


def _chat(way: Way) -> tuple[str, openai.types.CompletionUsage]:
    with way.client() as client:
        found = client.chat.completions.create(
            model="smollm2", messages=MESSAGES, max_tokens=24, temperature=0, extra_body={"ignore_eos": True}
        )
    assert found.usage is not None
    return found.choices[0].message.content or "", found.usage


def _streamed_chat(way: Way) -> str:
    with (
        way.client() as client,
        client.chat.completions.create(
            model="smollm2",
            messages=MESSAGES,
            max_tokens=24,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True},
        ) as chunks,
    ):
        return "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)


def _figures(way: Way) -> tuple[float, float]:
    """Tokens that decode has pulled, and tokens that it has had to compute itself."""
    if way.decode is None:
        return 0.0, 0.0
    return way.decode("transferred_tokens_total"), way.decode("recomputed_tokens_total")


def _wait_for(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + FIGURES_S
    while not holds():
        assert time.monotonic() < deadline, "the figures never showed it"
        time.sleep(0.05)
