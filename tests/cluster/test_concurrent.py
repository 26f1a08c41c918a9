"""Many at once: every request gets exactly one answer, the right one, and not a block is left over."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from tests.cluster.asked import DEADLINE_S, Asked, Outcome, outcomes
from tests.cluster.local_cluster import LocalCluster
from tests.cluster.prompts import prompt_of

pytestmark = pytest.mark.cluster

MANY = 64
BURST_S = 3 * DEADLINE_S
LENGTHS = (1, 15, 16, 17, 40, 130)  # tokens of a prompt
SMALL_POOL = ("--kv-cache-memory", "40MiB", "--max-num-seqs", "12", "--max-queue", "8")  # 56 blocks, 896 tokens


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """A decode engine that cannot hold what it is asked for."""
    with LocalCluster(tmp_path_factory.mktemp("small"), decode_flags=SMALL_POOL) as cluster:
        yield cluster
        cluster.assert_whole()


def test_mixed_requests_at_once_are_each_answered_as_if_alone(cluster: LocalCluster) -> None:
    """Long and short, streamed and whole; some clients leave, at once or after their first tokens."""
    chance = random.Random(1)
    asked: list[Asked] = []
    for number in range(MANY):
        length, count = LENGTHS[number % len(LENGTHS)], chance.randint(1, 16)
        prompt = prompt_of(length, f"mixed {number % 24}")
        asked.append(Asked(cluster.url(), prompt, stream=number % 3 > 0, max_tokens=count, request_id="the-same"))
    leaving = asked[5::8]
    for number, each in enumerate(leaving):
        if number % 2:
            each.wait_for_tokens(1)
        each.hang_up()
    staying = [each for each in asked if each not in leaving]
    found = outcomes(staying, BURST_S)
    cluster.assert_whole()
    prompts = {tuple(each.prompt): each.prompt for each in staying}
    alone = {key: Asked(cluster.url(), prompt, max_tokens=16).outcome() for key, prompt in prompts.items()}
    for each, outcome in zip(staying, found, strict=True):
        _assert_whole_answer(outcome)
        expected = alone[tuple(each.prompt)].token_ids
        assert outcome.token_ids == expected[: len(outcome.token_ids)], each.prompt


def test_a_pool_too_small_for_all_preempts_and_loses_no_token(small: LocalCluster, cluster: LocalCluster) -> None:
    prompts = [prompt_of(40, f"small {number}") for number in range(12)]
    before = small.engine_metric("decode-1", "preemptions_total")
    found = outcomes([Asked(small.url(), prompt, stream=True, max_tokens=64) for prompt in prompts], BURST_S)
    small.assert_whole()
    assert small.engine_metric("decode-1", "preemptions_total") > before
    expected = outcomes([Asked(cluster.url(), prompt, stream=True, max_tokens=64) for prompt in prompts], BURST_S)
    for ours, theirs in zip(found, expected, strict=True):
        _assert_whole_answer(ours)
        assert ours.token_ids == theirs.token_ids


def test_too_many_are_told_to_come_again(small: LocalCluster) -> None:
    asked = [Asked(small.url(), prompt_of(20, f"flood {i}"), stream=i % 2 > 0, max_tokens=24) for i in range(MANY)]
    found = outcomes(asked, BURST_S)
    refused = [outcome for outcome in found if outcome.status == 429]
    assert refused
    assert len(refused) < MANY
    for outcome in found:
        if outcome.status == 429:
            assert int(outcome.headers["Retry-After"]) >= 1
            assert outcome.failed
        else:
            _assert_whole_answer(outcome)
    small.assert_whole()


def test_what_can_never_fit_is_refused_at_once(small: LocalCluster) -> None:
    outcome = Asked(small.url(), prompt_of(600, "too long"), max_tokens=600).outcome()
    assert (outcome.status, outcome.failed) == (400, True)


def _assert_whole_answer(outcome: Outcome) -> None:
    assert (outcome.status, outcome.done, outcome.error, outcome.broken) == (200, True, None, None), outcome
    assert outcome.finish_reason == "length"
    assert outcome.token_ids
