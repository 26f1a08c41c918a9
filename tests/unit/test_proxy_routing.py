"""Each strategy picks whom it promises to."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass

import pytest

from proxy.routing import choose, speeds


@dataclass
class Engine:
    name: str
    speed: float | None = None
    unfinished: int = 0
    recent_latency: float | None = None


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(7)


def picks(strategy: str, engines: list[Engine], times: int = 2000) -> Counter[str]:
    return Counter(choose(strategy, engines).name for _ in range(times))


def test_random_goes_by_speed_and_null_counts_as_the_mean() -> None:
    engines = [Engine("slow", speed=1), Engine("fast", speed=3), Engine("unknown")]
    assert speeds(engines) == [1, 3, 2]
    counts = picks("random", engines, 6000)
    assert counts["slow"] == pytest.approx(1000, rel=0.15)
    assert counts["fast"] == pytest.approx(3000, rel=0.15)
    assert counts["unknown"] == pytest.approx(2000, rel=0.15)


def test_without_any_speed_all_count_as_one() -> None:
    assert speeds([Engine("a"), Engine("b", speed=0)]) == [1, 1]


def test_min_expected_latency_is_unfinished_per_speed_with_ties_drawn() -> None:
    assert set(picks("min_expected_latency", [Engine("a", 1, 2), Engine("b", 4, 4), Engine("c", 1, 3)])) == {"b"}
    assert set(picks("min_expected_latency", [Engine("a"), Engine("b")])) == {"a", "b"}


def test_min_observed_latency_takes_the_quickest() -> None:
    engines = [Engine("a", recent_latency=0.3), Engine("b", recent_latency=0.1, unfinished=50)]
    assert set(picks("min_observed_latency", engines)) == {"b"}


def test_a_new_node_is_tried_with_one_request_at_a_time() -> None:
    known = Engine("known", recent_latency=0.1)
    assert set(picks("min_observed_latency", [known, Engine("new")])) == {"new"}
    busy = Engine("new", unfinished=1)
    assert set(picks("min_observed_latency", [known, busy, Engine("slow", recent_latency=0.5)])) == {"known"}


def test_while_nothing_is_known_the_least_loaded_is_taken() -> None:
    assert set(picks("min_observed_latency", [Engine("a", unfinished=3), Engine("b", unfinished=2)])) == {"b"}


def test_power_of_two_never_takes_the_most_loaded() -> None:
    counts = picks("power_of_two", [Engine("a", unfinished=1), Engine("b", unfinished=2), Engine("c", unfinished=3)])
    assert counts["c"] == 0
    assert counts["a"] == pytest.approx(2 * counts["b"], rel=0.2)


@pytest.mark.parametrize("strategy", ["random", "min_expected_latency", "min_observed_latency", "power_of_two"])
def test_a_single_node_is_taken_whatever_its_state(strategy: str) -> None:
    assert choose(strategy, [Engine("only", unfinished=99)]).name == "only"
