"""What the proxy counts. Plain integers on the hot path; Prometheus' text is made when someone asks for it."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from proxy.nodes import Node

Sample = tuple[tuple[object, ...], float]  # label values, value

FIRST_BYTE_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


@dataclass(slots=True)
class Metrics:
    """One per proxy. Counters only grow."""

    requests: Counter[tuple[str, int]] = field(default_factory=Counter)  # by route and status
    in_flight: int = 0
    queued: int = 0
    retries: int = 0
    handoffs: Counter[str] = field(default_factory=Counter)  # concurrent, sequential, declined, recomputed, unlinked
    cut_answers: int = 0  # ended by an error after their first byte
    client_disconnects: int = 0
    relayed_bytes: int = 0
    first_byte_counts: list[int] = field(default_factory=lambda: [0] * (len(FIRST_BYTE_BUCKETS_S) + 1))
    first_byte_sum_s: float = 0.0

    def first_byte(self, seconds: float) -> None:
        self.first_byte_counts[bisect_left(FIRST_BYTE_BUCKETS_S, seconds)] += 1
        self.first_byte_sum_s += seconds

    def text(self, nodes: Iterable[Node], links: Counter[str]) -> bytes:
        """The exposition format, with the state of nodes and links at this moment."""
        registry = CollectorRegistry()
        registry.register(_Snapshot(lambda: _families(self, list(nodes), links)))
        return generate_latest(registry)


@dataclass(slots=True, eq=False)
class _Snapshot(Collector):
    families: Callable[[], Iterator[Metric]]

    def collect(self) -> Iterator[Metric]:
        return self.families()


def _families(metrics: Metrics, nodes: list[Node], links: Counter[str]) -> Iterator[Metric]:
    yield _counter("requests", "Requests answered", ["route", "status"], metrics.requests.items())
    yield _gauge("in_flight", "Requests under way", metrics.in_flight)
    yield _gauge("queued", "Requests waiting for one under way to end", metrics.queued)
    yield _plain("retries", "Requests sent to another engine", metrics.retries)
    yield _plain("cut_answers", "Answers that ended in an error after their first byte", metrics.cut_answers)
    yield _plain("client_disconnects", "Clients that left before their answer ended", metrics.client_disconnects)
    yield _plain("relayed_bytes", "Bytes of answers passed on", metrics.relayed_bytes)
    yield _counter("handoffs", "How prefill and decode shared requests", ["kind"], _tupled(metrics.handoffs))
    yield _first_bytes(metrics)
    for state in ("connecting", "connected", "failed"):
        links.setdefault(state, 0)
    yield _gauges("links", "Prefill-decode pairs", ["state"], _tupled(links))
    yield from _of_nodes(nodes)


def _of_nodes(nodes: list[Node]) -> Iterator[Metric]:
    names = ["node", "role"]

    def of_each(value: Callable[[Node], float]) -> list[Sample]:
        return [((node.url, node.role.name.lower()), value(node)) for node in nodes]

    yield _gauges("node_up", "1 while the node gets requests", names, of_each(lambda node: node.up))
    yield _gauges("node_unfinished", "Requests the node has under way", names, of_each(lambda node: node.unfinished))
    yield _counter("node_requests", "Requests sent to the node", names, of_each(lambda node: node.requests))
    yield _counter("node_served", "Requests the node served", names, of_each(lambda node: node.latency_count))
    yield _counter("node_latency_seconds", "Time they took", names, of_each(lambda node: node.latency_sum_s))
    faults = [
        ((node.url, node.role.name.lower(), kind), number)
        for node in nodes
        for kind, number in node.fault_counts.items()
    ]
    yield _counter("node_faults", "Failures of the node", [*names, "kind"], faults)


def _tupled(counts: Counter[str]) -> list[Sample]:
    return [((name,), number) for name, number in counts.items()]


def _counter(name: str, text: str, labels: list[str], samples: Iterable[Sample]) -> Metric:
    family = CounterMetricFamily(f"tandem_proxy_{name}", text, labels=labels)
    for key, value in samples:
        family.add_metric([str(part) for part in key], value)
    return family


def _gauges(name: str, text: str, labels: list[str], samples: Iterable[Sample]) -> Metric:
    family = GaugeMetricFamily(f"tandem_proxy_{name}", text, labels=labels)
    for key, value in samples:
        family.add_metric([str(part) for part in key], value)
    return family


def _plain(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(f"tandem_proxy_{name}", text, value=value)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"tandem_proxy_{name}", text, value=value)


def _first_bytes(metrics: Metrics) -> Metric:
    family = HistogramMetricFamily(
        "tandem_proxy_first_byte_seconds", "From a request's arrival to its answer's first byte"
    )
    total, buckets = 0, []
    for bound, number in zip([*map(str, FIRST_BYTE_BUCKETS_S), "+Inf"], metrics.first_byte_counts, strict=True):
        total += number
        buckets.append((bound, total))
    family.add_metric([], buckets=buckets, sum_value=metrics.first_byte_sum_s)
    return family
