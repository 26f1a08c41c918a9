"""An engine's metrics in Prometheus' format. What the core counts is read from its latest Stats at scrape time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from engine.messages import LinkStats, Stats

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
FIRST_TOKEN_BUCKETS_S: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
NEXT_TOKEN_BUCKETS_S: Final = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.2, 5)
REQUEST_BUCKETS_S: Final = (0.01, 0.05, 0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)

GAUGES: Final = {
    "num_waiting": ("requests_waiting", "Sequences without blocks: for a step, or for a hand-off"),
    "waiting_tokens": ("waiting_tokens", "Known tokens that are not computed yet"),
    "num_running": ("requests_running", "Sequences in the running batch"),
    "num_handoff": ("requests_in_handoff", "Hand-offs that are expected, pulled or under lease"),
    "blocks_free": ("kv_blocks_free", "Blocks of the KV pool that nobody holds"),
    "blocks_total": ("kv_blocks_total", "Blocks of the KV pool"),
}
COUNTERS: Final = {
    "steps": ("steps", "Forward passes"),
    "prompt_tokens": ("prompt_tokens", "Prompt tokens of requests that came"),
    "output_tokens": ("output_tokens", "Tokens said to clients; after a hand-off the first comes from prefill"),
    "cached_tokens": (
        "cached_tokens",
        "Prompt tokens found in the prefix cache; after a hand-off, in the prefill engine's",
    ),
    "draft_tokens": ("draft_tokens", "Tokens guessed from what the text repeats, and checked"),
    "accepted_tokens": ("accepted_tokens", "Draft tokens that were what was sampled anyway"),
    "preemptions": ("preemptions", "Sequences that gave up their blocks to others"),
    "transferred_tokens": ("transferred_tokens", "Tokens whose KV was pulled from a peer"),
    "recomputed_tokens": ("recomputed_tokens", "Prompt tokens computed here because no hand-off came"),
    "local_tokens": ("local_tokens", "Prompt tokens computed here: too few to move, or prefill was too far behind"),
    "transferred_bytes": ("transferred_bytes", "KV bytes pulled from peers"),
    "pull_seconds": ("pull_seconds", "Time spent copying KV"),
    "exposed_seconds": ("exposed_seconds", "Time of hand-offs that prefill did not hide"),
}

disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each, which nobody asked for


class EngineMetrics:
    """A registry of its own, so that several engines can live in one test process."""

    def __init__(self, stats: Callable[[], Stats | None], prefix: str = "tandem_engine") -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            f"{prefix}_http_requests", "Requests by route and status", ["route", "status"], registry=self._registry
        )
        self._seconds = Histogram(
            f"{prefix}_http_request_seconds",
            "From head to end",
            ["route"],
            buckets=REQUEST_BUCKETS_S,
            registry=self._registry,
        )
        self._failures = Counter(
            f"{prefix}_stream_failures",
            "Streams that failed after their first byte",
            ["reason"],
            registry=self._registry,
        )
        self._first_token = Histogram(
            f"{prefix}_time_to_first_token_seconds",
            "From a request's arrival to its first token",
            buckets=FIRST_TOKEN_BUCKETS_S,
            registry=self._registry,
        )
        self._next_token = Histogram(
            f"{prefix}_inter_token_seconds",
            "Between two tokens of one answer",
            buckets=NEXT_TOKEN_BUCKETS_S,
            registry=self._registry,
        )
        self._registry.register(CoreCollector(stats, prefix))

    def request_ended(self, route: str, status: str, seconds: float) -> None:
        """`status` is the HTTP status, or `disconnected`."""
        self._requests.labels(route, status).inc()
        self._seconds.labels(route).observe(seconds)

    def stream_failed(self, reason: str) -> None:
        self._failures.labels(reason).inc()

    def first_token(self, seconds: float) -> None:
        self._first_token.observe(seconds)

    def next_tokens(self, seconds: float, num_tokens: int) -> None:
        """`num_tokens` came together, `seconds` after those before them."""
        for _ in range(num_tokens):
            self._next_token.observe(seconds / num_tokens)

    def exposition(self) -> bytes:
        return generate_latest(self._registry)


class CoreCollector(Collector):
    """The core's own figures."""

    def __init__(self, stats: Callable[[], Stats | None], prefix: str) -> None:
        self._stats = stats
        self._prefix = prefix

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        if stats is None:
            return
        for field, (name, text) in GAUGES.items():
            yield GaugeMetricFamily(f"{self._prefix}_{name}", text, value=getattr(stats, field))
        for field, (name, text) in COUNTERS.items():
            yield CounterMetricFamily(f"{self._prefix}_{name}", text, value=getattr(stats, field))
        yield from self._links(stats.links)

    def _links(self, links: list[LinkStats]) -> Iterator[Metric]:
        labels = ["peer", "transport"]
        connected = GaugeMetricFamily(f"{self._prefix}_link_connected", "1 while a peer can be read", labels=labels)
        speed = GaugeMetricFamily(f"{self._prefix}_link_gigabytes_per_second", "As measured at connect", labels=labels)
        for link in links:
            connected.add_metric([link.peer, link.transport], float(link.connected))
            speed.add_metric([link.peer, link.transport], link.gigabytes_per_s)
        yield connected
        yield speed
