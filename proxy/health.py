"""Keeps asking nodes whether they are alive: puts hung ones out, lets recovered ones in, forgets the long dead."""

from __future__ import annotations

import asyncio
import logging

from proxy.exchange import Loss, UpstreamFailed
from proxy.nodes import Node, NodeTable

log = logging.getLogger("proxy.health")

MISSES = 2  # probes without an answer before a node that is otherwise silent is out
FIRST_RETRY_S = 0.1
LONGEST_RETRY_S = 1.5


class Prober:
    """One task for each node, from `watch` until `forget`."""

    def __init__(self, nodes: NodeTable, interval_s: float, timeout_s: float, ttl_s: float) -> None:
        self._nodes = nodes
        self._interval_s, self._timeout_s, self._ttl_s = interval_s, timeout_s, ttl_s
        self._tasks: dict[Node, asyncio.Task[None]] = {}

    def follow(self) -> None:
        """Makes the watched nodes the registered ones."""
        registered = set(self._nodes.all())
        for node in registered - self._tasks.keys():
            self._tasks[node] = asyncio.create_task(self._watch(node), name=f"probe {node.url}")
        for node in self._tasks.keys() - registered:
            self._tasks.pop(node).cancel()

    def close(self) -> None:
        for task in self._tasks.values():
            task.cancel()

    async def _watch(self, node: Node) -> None:
        misses, retry_s, out_since = 0, FIRST_RETRY_S, 0.0
        while True:
            misses = await self._probe(node, misses)
            if node.up:
                retry_s, out_since = FIRST_RETRY_S, 0.0
                await asyncio.sleep(self._interval_s)
                continue
            out_since = out_since or node.upstream.now()
            if self._is_dead(node, out_since):
                log.info("%s is forgotten: out for %g s without a heartbeat", node.url, self._ttl_s)
                self._nodes.remove(node.url)  # ends this task
                return
            await asyncio.sleep(retry_s)
            retry_s = min(retry_s * 2, LONGEST_RETRY_S)

    async def _probe(self, node: Node, misses: int) -> int:
        """How many probes in a row have gone without an answer."""
        began = node.upstream.now()
        try:
            answer = await node.upstream.call("GET", "/health", timeout_s=self._timeout_s)
        except UpstreamFailed as error:
            if error.loss in (Loss.REFUSED, Loss.UNREACHABLE):
                self._put_out(node, error)
            elif not node.upstream.heard_since(began):  # a busy engine may be late, but its streams go on
                misses += 1
                if misses >= MISSES:
                    self._put_out(node, UpstreamFailed(Loss.TIMEOUT, f"is hung: {misses} health probes unanswered"))
            return misses
        if answer.status < 500:  # an engine without /health says 404, and is alive
            self._nodes.let_in(node)
        else:
            node.put_out(f"its health is {answer.status}")
        return 0

    def _put_out(self, node: Node, error: UpstreamFailed) -> None:
        """Nobody listening may be a drain, and a death shows by itself; in any other case nobody need wait longer."""
        node.refused = node.refused or error.loss is Loss.REFUSED
        node.put_out(error.message)
        if error.loss is not Loss.REFUSED:
            node.upstream.fail_unstarted(error.message)

    def _is_dead(self, node: Node, out_since: float) -> bool:
        now = node.upstream.now()
        silent = node.heartbeat_at is not None and now - node.heartbeat_at > self._ttl_s
        return silent and now - out_since > self._ttl_s
