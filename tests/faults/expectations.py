"""Prompts, the tokens that must follow them, and what every fault must leave behind."""

from __future__ import annotations

from dataclasses import dataclass

from tests.cluster.asked import Asked, Outcome
from tests.cluster.local_cluster import LocalCluster
from tests.cluster.prompts import prompt_of
from tests.cluster.reference import Reference

LONG, SHORT = 600, 40  # tokens of a prompt
COUNT = 12  # tokens of an answer whose tokens are compared
FEW = 2  # of one that only shows that there are answers: the first is prefill's, the second decode's
RECOVERY_S = 20.0  # for engines to find each other again, on a busy machine


@dataclass(frozen=True, slots=True)
class Expected:
    prompt: list[int]
    token_ids: list[int]


class Expectations:
    """What transformers says, asked once for each prompt."""

    def __init__(self, reference: Reference) -> None:
        self._reference = reference
        self._known: dict[tuple[str, int], Expected] = {}

    def of(self, length: int = SHORT, name: str = "") -> Expected:
        """The same each time: nothing is cached, and transformers takes seconds. Prompts of other names are others."""
        if (name, length) not in self._known:
            prompt = prompt_of(length, name)
            self._known[name, length] = Expected(prompt, self._reference.greedy(prompt, COUNT))
        return self._known[name, length]

    def assert_shared(self, cluster: LocalCluster) -> None:
        """New requests succeed, decode reads its KV from prefill again, and every block comes home, all of it soon."""
        expected = self.of()

        def moves() -> bool:
            before = cluster.engine_metric("decode-1", "transferred_tokens_total")
            assert_answered(Asked(cluster.url(), expected.prompt, max_tokens=FEW).outcome(), expected)
            return cluster.engine_metric("decode-1", "transferred_tokens_total") > before

        cluster.eventually(moves, "a request goes through both engines", RECOVERY_S)
        cluster.assert_whole()


def assert_answered(outcome: Outcome, expected: Expected) -> None:
    """Exactly one answer, the right one, and nothing of anybody else's."""
    assert outcome.error is None, outcome
    assert (outcome.status, outcome.done, outcome.broken) == (200, True, None), outcome
    count = len(outcome.token_ids)
    assert outcome.token_ids[:COUNT] == expected.token_ids[:count], outcome
    assert outcome.finish_reason == "length", outcome


def assert_failed_truly(outcome: Outcome, expected: Expected) -> None:
    """An error that says so, after nothing but right tokens."""
    assert outcome.failed, outcome
    assert outcome.token_ids[:COUNT] == expected.token_ids[: len(outcome.token_ids)], outcome
