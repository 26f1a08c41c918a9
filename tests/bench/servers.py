"""Servers to measure: clusters of our own, started here on chosen cores, and any OpenAI server by URL."""

from __future__ import annotations

import contextlib
import json
import os
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from deploy.cluster import Cluster, Keys, Member
from deploy.logs import Logs
from deploy.ports import free_ports
from tests.bench.load import Target

START_S = 180.0


@dataclass(frozen=True, slots=True)
class Plan:
    """One of our clusters: the role and the cores of each engine."""

    name: str
    engines: tuple[tuple[str, tuple[int, ...]], ...]

    @property
    def through_proxy(self) -> bool:
        return len(self.engines) > 1


def plans() -> dict[str, Plan]:
    """On the first two cores this process may use (or twice the only one)."""
    cores = sorted(os.sched_getaffinity(0))
    first, second = cores[0], cores[1 % len(cores)]
    return {
        "hybrid": Plan("hybrid", (("hybrid", tuple(sorted({first, second}))),)),
        "pair": Plan("pair", (("prefill", (first,)), ("decode", (second,)))),
        "two-hybrids": Plan("two-hybrids", (("hybrid", (first,)), ("hybrid", (second,)))),
    }


@contextlib.contextmanager
def started(plan: Plan, model: str, flags: Sequence[str], logs: Path) -> Iterator[tuple[Target, float]]:
    """A running cluster and the seconds from its start to its first answered request."""
    proxy_port, *ports = free_ports(1 + len(plan.engines))
    proxy_url = f"http://127.0.0.1:{proxy_port}"
    members = [Member("proxy", "proxy", proxy_url, ("--port", str(proxy_port)))]
    for index, ((role, cores), port) in enumerate(zip(plan.engines, ports, strict=True)):
        own = ("--role", role, "--port", str(port), "--model", model, "--proxy-url", proxy_url)
        every = (*own, "--num-threads", str(len(cores)), *flags)
        members.append(Member(f"{role}-{index}", role, f"http://127.0.0.1:{port}", every, cores))
    with Logs(logs / plan.name) as lines:
        cluster = Cluster(members, model, Keys(), lines.hear, lambda text: None)
        try:
            began = time.monotonic()
            cluster.start()
            cluster.wait_ready(START_S)
            yield Target(f"tandem {plan.name}", proxy_url, model), time.monotonic() - began
        finally:
            cluster.stop(10.0)


def by_url(named: str) -> Target:
    """`name=http://host:port[#model]`; without a model, the first that the server lists. Raises OSError, ValueError."""
    name, _, rest = named.partition("=")
    url, _, model = rest.partition("#")
    if not model:
        with urllib.request.urlopen(f"{url}/v1/models", timeout=10) as reply:
            model = json.load(reply)["data"][0]["id"]
    return Target(name, url.rstrip("/"), model)
