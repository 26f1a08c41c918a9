"""Links: which prefill and decode engines are connected, so that KV can move between them.

    missing ─▶ CONNECTING ─▶ CONNECTED
                   ▲  └────▶ FAILED ──(backoff)──┐
                   └─────────────────────────────┘

A link belongs to two incarnations: when an engine comes back as another process, its links are torn down on the healthy
side and made anew. Pairs are connected as soon as both engines are known, so that the first request finds them warm; a
request that comes too early waits for the one attempt under way, among a bounded number of others.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from engine.api.distserve import EngineRole
from engine.api.errors import TandemError
from proxy.handshake import Handshake, LinkFailed, LinkTerms, drop_link
from proxy.nodes import Node

log = logging.getLogger("proxy.links")

MAX_WAITERS = 1024  # requests for one link's attempt
FIRST_RETRY_S, LONGEST_RETRY_S = 0.25, 8.0


class LinkState(StrEnum):
    CONNECTING = "connecting"
    CONNECTED = "connected"
    FAILED = "failed"


class Pair(NamedTuple):
    """Names a link; the incarnations make it another one after a restart."""

    prefill: str
    prefill_incarnation: str
    decode: str
    decode_incarnation: str


@dataclass(slots=True, eq=False)
class Link:
    pair: Pair
    prefill: Node
    decode: Node
    state: LinkState = LinkState.CONNECTING
    concurrent: bool = False  # both engines are ours: prefill and decode may run at once
    reason: str = ""  # of the last failure
    failures: int = 0  # in a row
    connect_seconds: float = 0.0
    waiters: int = 0
    settled: asyncio.Event = field(default_factory=asyncio.Event)  # the attempt under way has ended
    task: asyncio.Task[None] | None = None
    begun: bool = False  # an engine may hold something for it


def pair_of(prefill: Node, decode: Node) -> Pair:
    return Pair(prefill.url, prefill.incarnation, decode.url, decode.incarnation)


class Links:
    """Owns every link and the task that keeps it."""

    def __init__(self, terms: LinkTerms) -> None:
        self._deadline_s = terms.deadline_s
        self._handshake = Handshake(terms)
        self._links: dict[Pair, Link] = {}
        self._dropping: dict[tuple[str, str], asyncio.Task[None]] = {}  # by URLs: a new link waits for it

    def follow(self, nodes: list[Node]) -> None:
        """Makes the links those of the registered nodes."""
        wanted = {pair_of(prefill, decode): (prefill, decode) for prefill, decode in _pairs(nodes)}
        for pair in self._links.keys() - wanted.keys():
            self._drop(self._links.pop(pair), {node.url: node for node in nodes})
        for pair in wanted.keys() - self._links.keys():
            link = Link(pair, *wanted[pair])
            self._links[pair] = link
            self._start(link)

    def _start(self, link: Link) -> None:
        link.state = LinkState.CONNECTING
        link.settled.clear()
        link.task = asyncio.create_task(self._keep(link), name=f"link {link.pair.prefill} {link.pair.decode}")

    def get(self, prefill: Node, decode: Node) -> Link | None:
        return self._links.get(pair_of(prefill, decode))

    def failing(self, prefill: Node, decode: Node) -> bool:
        """Whether the last attempt failed: then a request need not wait for the next."""
        link = self.get(prefill, decode)
        return link is None or link.state is LinkState.FAILED

    async def ready(self, prefill: Node, decode: Node) -> Link:
        """The connected link of this pair. Raises LinkFailed within the handshake's deadline."""
        link = self.get(prefill, decode)
        if link is None:
            raise LinkFailed(f"{prefill.url} and {decode.url} are not to be linked")
        if link.state is not LinkState.CONNECTED:
            await self._wait(link)
        return link

    async def _wait(self, link: Link) -> None:
        if link.waiters >= MAX_WAITERS:
            raise LinkFailed(f"{MAX_WAITERS} requests already wait for {link.pair.prefill} and {link.pair.decode}")
        link.waiters += 1
        try:
            async with asyncio.timeout(self._deadline_s):
                await link.settled.wait()
        except TimeoutError:
            raise LinkFailed(f"connecting {link.pair.prefill} and {link.pair.decode} takes too long") from None
        finally:
            link.waiters -= 1
        if link.state is not LinkState.CONNECTED:
            raise LinkFailed(link.reason)

    async def warm_up(self) -> None:
        """Waits for every pair; what failed before is tried now. Raises LinkFailed, naming those that fail again."""
        for link in self._links.values():
            if link.state is LinkState.FAILED and link.task is not None:
                link.task.cancel()
                self._start(link)
        results = await asyncio.gather(*map(self._wait, self._links.values()), return_exceptions=True)
        failures = [str(result) for result in results if isinstance(result, LinkFailed)]
        if failures:
            raise LinkFailed("; ".join(failures))

    def all(self) -> list[Link]:
        return list(self._links.values())

    def counts(self) -> Counter[str]:
        return Counter(str(link.state) for link in self._links.values())

    async def close(self) -> None:
        tasks = [link.task for link in self._links.values() if link.task] + list(self._dropping.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # one link's life

    async def _keep(self, link: Link) -> None:
        """Connects, again and again until it has."""
        dropping = self._dropping.get((link.pair.prefill, link.pair.decode))
        if dropping is not None:
            await asyncio.wait([dropping])
        while True:
            link.settled.clear()
            link.state = LinkState.CONNECTING
            try:
                await self._attempt(link)
                return
            except LinkFailed as error:
                self._failed(link, error)
            if link.begun:
                await self._tell_drop(link, {})
            await asyncio.sleep(min(FIRST_RETRY_S * 2 ** (link.failures - 1), LONGEST_RETRY_S))

    async def _attempt(self, link: Link) -> None:
        began = time.monotonic()
        try:
            async with asyncio.timeout(self._deadline_s):
                link.begun = True
                link.concurrent = await self._handshake.run(link.prefill, link.decode)
        except TimeoutError:
            raise LinkFailed(f"{link.pair.prefill} and {link.pair.decode} did not connect in time") from None
        except TandemError as error:
            raise LinkFailed(error.message) from None
        link.connect_seconds = time.monotonic() - began
        link.state, link.failures, link.reason = LinkState.CONNECTED, 0, ""
        link.settled.set()
        log.info(
            "%s and %s are linked (%s, %.0f ms)",
            *(link.pair.prefill, link.pair.decode),
            *("concurrent" if link.concurrent else "sequential", link.connect_seconds * 1e3),
        )

    def _failed(self, link: Link, error: LinkFailed) -> None:
        if error.message != link.reason:
            log.warning("%s and %s are not linked: %s", link.pair.prefill, link.pair.decode, error.message)
        link.state, link.reason = LinkState.FAILED, error.message
        link.failures += 1
        link.settled.set()

    # its end

    def _drop(self, link: Link, registered: dict[str, Node]) -> None:
        """Tears it down on both sides, as far as they are still there. Whoever waits for it learns at once."""
        if link.task is not None:
            link.task.cancel()
        link.state, link.reason = LinkState.FAILED, "the link was dropped"
        link.settled.set()
        if not link.begun:
            return
        urls = (link.pair.prefill, link.pair.decode)
        task = asyncio.create_task(self._tell_drop(link, registered), name="drop link")
        self._dropping[urls] = task
        task.add_done_callback(lambda done: self._dropping.pop(urls) if self._dropping.get(urls) is done else None)

    async def _tell_drop(self, link: Link, registered: dict[str, Node]) -> None:
        sides = [(link.prefill, link.pair.decode), (link.decode, link.pair.prefill)]
        await asyncio.gather(*(drop_link(registered.get(node.url, node), peer) for node, peer in sides))


def _pairs(nodes: list[Node]) -> list[tuple[Node, Node]]:
    prefill = [node for node in nodes if node.role is EngineRole.PREFILL]
    decode = [node for node in nodes if node.role is EngineRole.DECODE]
    return [(p, d) for p in prefill for d in decode if not set(p.models).isdisjoint(d.models)]
