"""What live requests own: their share of nodes, their exchanges with engines, and KV that is held for them.

A lease gives all of it back when the request ends, however it ends. KV that nobody will read any more is freed at its
holder at once; what could not be freed (the engine did not answer) is kept on a list that `collect` goes through again.
Giving back never waits, so that a cancelled request cannot be interrupted in the middle of it.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Coroutine
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import msgspec

from engine.api.distserve import MAX_SESSION, FreeCacheRequest
from engine.api.errors import TandemError
from proxy.exchange import Exchange
from proxy.nodes import Node

log = logging.getLogger("proxy.leases")

FREE_DEADLINE_S = 2.0
MAX_ORPHANS = 4096  # beyond these, engines' own expiry has to do


@dataclass(frozen=True, slots=True)
class HeldCache:
    """A prompt's KV at `prefill`, kept for `reader` under `session`."""

    prefill: Node
    reader: str
    session: int


class Leases:
    """Where the leases of this proxy come from, and what became of what they held."""

    def __init__(self) -> None:
        self._orphans: dict[HeldCache, None] = {}
        self._frees: set[asyncio.Task[bool]] = set()

    def open(self) -> Lease:
        return Lease(self, session=random.getrandbits(53) & MAX_SESSION)

    def ended(self, lease: Lease) -> None:
        lease.let_go()

    def free_soon(self, held: HeldCache) -> None:
        if len(self._orphans) >= MAX_ORPHANS:
            oldest = next(iter(self._orphans))
            del self._orphans[oldest]
            log.warning("too much to free: session %d at %s is left to expire", oldest.session, oldest.prefill.url)
        self._orphans[held] = None
        task = asyncio.create_task(self._free(held), name="free cache")
        self._frees.add(task)
        task.add_done_callback(self._frees.discard)

    async def _free(self, held: HeldCache) -> bool:
        freed = held.prefill.removed or await free_cache(held.prefill, held.reader, held.session)
        if freed:
            self._orphans.pop(held, None)
        return freed

    async def collect(self) -> int:
        """Frees what no live request owns; how many could not be freed now."""
        results = await asyncio.gather(*map(self._free, list(self._orphans)))
        return results.count(False)

    async def close(self) -> None:
        if self._frees:
            await asyncio.wait(self._frees, timeout=FREE_DEADLINE_S)


@dataclass(slots=True, eq=False)
class Lease:
    """Of one attempt to answer one request. Use it as `with leases.open() as lease`."""

    leases: Leases
    session: int
    held: HeldCache | None = None  # set while a prefill engine keeps KV that nobody has confirmed to have read
    _nodes: list[Node] = field(default_factory=list)
    _exchanges: list[Exchange] = field(default_factory=list)
    _watch: asyncio.Task[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._watch is not None:
            self._watch.cancel()
        for exchange in self._exchanges:
            exchange.close()
        for node in self._nodes:
            node.unfinished -= 1
        self._nodes = []
        self.leases.ended(self)

    def took(self, node: Node) -> Node:
        """`node` was reserved for this request."""
        self._nodes.append(node)
        return node

    def release(self, node: Node) -> None:
        """Earlier than the lease's end. Idempotent."""
        if node in self._nodes:
            self._nodes.remove(node)
            node.unfinished -= 1

    def let_go(self) -> None:
        """Of what prefill keeps: nobody will read it. Idempotent."""
        held, self.held = self.held, None
        if held is not None:
            self.leases.free_soon(held)

    def began(self, exchange: Exchange) -> Exchange:
        self._exchanges.append(exchange)
        return exchange

    def watch(self, work: Coroutine[Any, Any, None]) -> None:
        """Runs beside the request, and no longer than it."""
        self._watch = asyncio.create_task(work)


async def free_cache(node: Node, other: str, session: int) -> bool:
    """Tells `node` that nobody will read (or bring) the KV of `session`; whether it has agreed."""
    body = msgspec.json.encode(FreeCacheRequest(other, session))
    try:
        answer = await node.upstream.call("POST", "/distserve/free_cache", body, timeout_s=FREE_DEADLINE_S)
    except TandemError as error:
        log.info("session %d was not freed at %s: %s", session, node.url, error.message)
        return False
    return answer.status == 200
