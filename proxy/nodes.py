"""The engines that this proxy knows: who serves what, who is up, how much each has to do.

A node is *up* until it proves otherwise. A refused connection proves it at once, three faults in a row do, and so do
two health probes without an answer; then only the prober lets it in again.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from statistics import fmean

import msgspec

from engine.api.distserve import EngineRole, Status
from engine.api.errors import InvalidRequest, NotFound, Unavailable
from proxy.exchange import Loss, UpstreamFailed
from proxy.routing import choose
from proxy.upstream import Upstream

log = logging.getLogger("proxy.nodes")

FAULTS_IN_A_ROW = 3
LATENCIES = 15  # kept, as LMDeploy keeps
FIRST_PENALTY_S, LONGEST_PENALTY_S = 0.25, 2.0  # out of use for faults, however healthy it looks
LATENCY_AGE_S = 30.0  # after this much silence a node's latencies say nothing about it
MAX_NODES = 4096
REMOVED = "removed"

_unnamed = count(1)


@dataclass(slots=True, eq=False)
class Node:
    """One registered engine. `incarnation` is its own, or one of ours when it says none."""

    url: str
    upstream: Upstream
    role: EngineRole = EngineRole.HYBRID
    models: tuple[str, ...] = ()
    speed: float | None = None
    incarnation: str = ""
    unfinished: int = 0
    latencies: deque[float] = field(default_factory=lambda: deque(maxlen=LATENCIES))  # seconds, of successes
    observed_at: float = 0.0  # monotonic, of the last of them
    heartbeat_at: float | None = None  # monotonic; None: it does not heartbeat
    out_because: str | None = None
    refused: bool = False  # nobody listened there for a while: it may come back as another process
    faults: int = 0  # in a row
    penalty_s: float = FIRST_PENALTY_S  # doubles each time that faults put it out, until a request is served
    out_until: float = 0.0  # monotonic
    fault_counts: dict[str, int] = field(default_factory=dict)
    requests: int = 0
    latency_sum_s: float = 0.0
    latency_count: int = 0

    @property
    def up(self) -> bool:
        return self.out_because is None

    @property
    def removed(self) -> bool:
        """It is registered no more, and stays out for good."""
        return self.out_because is REMOVED

    @property
    def recent_latency(self) -> float | None:
        if not self.latencies or self.upstream.now() - self.observed_at > LATENCY_AGE_S:
            return None
        return fmean(self.latencies)

    def served(self, seconds: float) -> None:
        """A request ended well."""
        self.faults, self.penalty_s = 0, FIRST_PENALTY_S
        self.latencies.append(seconds)
        self.observed_at = self.upstream.now()
        self.latency_sum_s += seconds
        self.latency_count += 1

    def answered(self, status: int) -> None:
        """The circuit breaker's view: 4xx is the client's doing, 429 and 503 say nothing, other 5xx are faults."""
        if status in (429, 503):
            return
        if status < 500:
            self.faults = 0
        else:
            self._fault("status_5xx", f"answered {status}", FAULTS_IN_A_ROW)

    def failed(self, error: UpstreamFailed) -> None:
        """No reply came. Nobody listening is proof enough; anything else is once more than the last time."""
        if error.loss not in (Loss.NODE_OUT, Loss.TOO_LONG):
            self.refused = self.refused or error.loss is Loss.REFUSED
            unconnected = error.loss in (Loss.REFUSED, Loss.UNREACHABLE)
            self._fault(error.loss, error.message, 1 if unconnected else FAULTS_IN_A_ROW)

    def _fault(self, kind: str, reason: str, enough: int) -> None:
        self.fault_counts[kind] = self.fault_counts.get(kind, 0) + 1
        self.faults += 1
        if self.faults < enough:
            return
        if self.up and enough > 1:
            self.out_until = self.upstream.now() + self.penalty_s
            self.penalty_s = min(self.penalty_s * 2, LONGEST_PENALTY_S)
        self.put_out(reason)

    def put_out(self, reason: str) -> None:
        if self.removed:
            return
        reason = reason.removeprefix(self.url).strip()
        if self.up:
            log.warning("%s is out: %s", self.url, reason)
        self.out_because = reason

    def let_in(self) -> None:
        if not self.up:
            log.info("%s is back", self.url)
        self.out_because = None
        self.faults = 0
        self.refused = False

    def status(self) -> Status:
        speed = None if self.speed is None else int(self.speed) if self.speed == int(self.speed) else self.speed
        latency = [round(seconds, 6) for seconds in self.latencies]
        return Status(
            role=self.role, models=list(self.models), unfinished=self.unfinished, latency=latency, speed=speed
        )


class NodeTable:
    """All of them, by URL. `on_change` is called after every registration and removal."""

    def __init__(self, strategy: str, make_upstream: Callable[[str], Upstream]) -> None:
        self._strategy = strategy
        self._make_upstream = make_upstream
        self._nodes: dict[str, Node] = {}
        self._serving: dict[str, list[Node]] = {}
        self._leaving: set[Upstream] = set()  # of removed nodes, with requests under way
        self.on_change: Callable[[], None] = lambda: None

    def all(self) -> list[Node]:
        return list(self._nodes.values())

    def get(self, url: str) -> Node:
        """Raises NotFound."""
        node = self._nodes.get(url)
        if node is None:
            raise NotFound(f"No node {url!r} is registered", param="url")
        return node

    def add(self, url: str, status: Status) -> Node:
        """Registers, or hears a heartbeat: what a node says of itself replaces what was known. Another incarnation
        under the same URL is another node. Raises InvalidRequest."""
        named = None if status.incarnation is msgspec.UNSET else status.incarnation
        known = self._nodes.get(url)
        if known is not None and (named is None or known.incarnation != named):
            self.remove(url)
            if named is not None:
                known.upstream.fail_unstarted("was restarted")
            known = None
        node = known or self._new(url, named)
        changed = known is None or (node.role, node.models) != (status.role, tuple(status.models or ()))
        node.role, node.models, node.speed = status.role, tuple(status.models or ()), status.speed
        node.heartbeat_at = node.upstream.now() if named is not None else None
        if changed:
            log.info("%s serves %s as %s", url, ", ".join(node.models) or "nothing", node.role.name.lower())
            self._changed()
        return node

    def _new(self, url: str, named: str | None) -> Node:
        if len(self._nodes) >= MAX_NODES:
            raise InvalidRequest(f"There are {MAX_NODES} nodes already")
        node = Node(url, self._make_upstream(url), incarnation=named or f"unnamed-{next(_unnamed)}")
        self._nodes[url] = node
        return node

    def remove(self, url: str) -> Node:
        """Raises NotFound. Requests under way go on to their end."""
        node = self.get(url)
        del self._nodes[url]
        node.out_because = REMOVED
        self._leaving.add(node.upstream)
        self._changed()
        return node

    def let_in(self, node: Node) -> None:
        """It answers again. One without a name of its own may be another process now: whoever is linked links again."""
        if node.upstream.now() < node.out_until:
            return
        if node.refused and node.incarnation.startswith("unnamed-"):
            node.incarnation = f"unnamed-{next(_unnamed)}"
            self.on_change()
        node.let_in()

    def _changed(self) -> None:
        self._serving = {}
        for node in self._nodes.values():
            for model in node.models:
                self._serving.setdefault(model, []).append(node)
        self.on_change()

    @property
    def models(self) -> list[str]:
        return list(self._serving)

    def serving(self, model: str | None) -> list[Node]:
        """Registered nodes for `model`, up or not; without a name, for the one model there is.

        Raises NotFound for an unknown model, Unavailable while there are no nodes, InvalidRequest without a name."""
        if model is None and len(self._serving) == 1:
            (nodes,) = self._serving.values()
            return nodes
        if model is None and self._serving:
            raise InvalidRequest(f"`model` is required: one of {', '.join(self._serving)}", param="model")
        nodes = self._serving.get(model or "", [])
        if not nodes and not self._serving:
            raise Unavailable("No engine is registered yet", code="no_engine")
        if not nodes:
            raise NotFound(
                f"The model {model!r} does not exist; there is {', '.join(self._serving)}",
                param="model",
                code="model_not_found",
            )
        return nodes

    def sweep(self) -> None:
        """Call it every half second or so: silent engines and idle connections are noticed here."""
        for node in self._nodes.values():
            node.upstream.sweep()
        for upstream in list(self._leaving):
            upstream.sweep()
            if not upstream.under_way():
                upstream.close()
                self._leaving.discard(upstream)

    def close(self) -> None:
        for upstream in [node.upstream for node in self._nodes.values()] + list(self._leaving):
            upstream.close()

    def reserve(self, nodes: list[Node]) -> Node:
        """Chooses and counts in one step, so that two requests never see the same load."""
        node = choose(self._strategy, nodes)
        node.unfinished += 1
        node.requests += 1
        return node

    def unreserve(self, node: Node) -> None:
        """As if it had not been chosen."""
        node.unfinished -= 1
        node.requests -= 1

    def status(self) -> dict[str, Status]:
        return {url: node.status() for url, node in self._nodes.items()}
