"""Which node gets a request: pure functions of the nodes to choose among.

    random                  weighted by speed
    min_expected_latency    fewest unfinished requests per speed
    min_observed_latency    least mean of the last latencies
    power_of_two            the less loaded of two drawn at random (the default: no herd, and no state to agree on)

A null speed counts as the mean of the known speeds, or as 1. Only successes are observed as latencies, so that a dead
node's fast failures attract nothing; and a node of which nothing recent is known is tried with one request at a time.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Protocol, TypeVar


class Candidate(Protocol):
    @property
    def speed(self) -> float | None: ...
    @property
    def unfinished(self) -> int: ...
    @property
    def recent_latency(self) -> float | None:
        """Mean of the last latencies in seconds; None when there are none, or only old ones."""


Chosen = TypeVar("Chosen", bound=Candidate)
Strategy = Callable[[Sequence[Chosen]], Chosen]


def choose(strategy: str, nodes: Sequence[Chosen]) -> Chosen:
    """One of `nodes`, of which there is at least one."""
    if len(nodes) == 1:
        return nodes[0]
    match strategy:
        case "random":
            return weighted(nodes)
        case "min_expected_latency":
            return min_expected_latency(nodes)
        case "min_observed_latency":
            return min_observed_latency(nodes)
        case _:
            return power_of_two(nodes)


def weighted(nodes: Sequence[Chosen]) -> Chosen:
    return random.choices(nodes, weights=speeds(nodes))[0]


def power_of_two(nodes: Sequence[Chosen]) -> Chosen:
    first, second = random.sample(nodes, 2)
    return second if second.unfinished < first.unfinished else first


def min_expected_latency(nodes: Sequence[Chosen]) -> Chosen:
    return _least(nodes, [node.unfinished / speed for node, speed in zip(nodes, speeds(nodes), strict=True)])


def min_observed_latency(nodes: Sequence[Chosen]) -> Chosen:
    unknown = [node for node in nodes if node.recent_latency is None]
    idle = [node for node in unknown if node.unfinished == 0]
    if idle:
        return random.choice(idle)
    known = [node.recent_latency for node in nodes if node.recent_latency is not None]
    if not known:
        return _least(nodes, [node.unfinished for node in nodes])
    mean = fmean(known)
    return _least(nodes, [mean if node.recent_latency is None else node.recent_latency for node in nodes])


def speeds(nodes: Sequence[Candidate]) -> list[float]:
    """Each node's weight, above 0."""
    known = [node.speed for node in nodes if node.speed is not None and node.speed > 0]
    mean = fmean(known) if known else 1.0
    return [node.speed if node.speed is not None and node.speed > 0 else mean for node in nodes]


def _least(nodes: Sequence[Chosen], scores: Sequence[float]) -> Chosen:
    """Ties are drawn by lot."""
    least = min(scores)
    return random.choice([node for node, score in zip(nodes, scores, strict=True) if score == least])
