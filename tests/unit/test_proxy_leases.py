"""KV that is held for nobody: freed where it can be, and never so much that nothing more is freed."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any, cast

import msgspec
import pytest

from engine.api.distserve import FreeCacheRequest
from proxy import leases as module
from proxy.exchange import Loss, UpstreamFailed
from proxy.leases import HeldCache, Leases
from proxy.nodes import Node
from proxy.upstream import Answer


@dataclass(eq=False)
class Engine:
    """Stands for the connections to a prefill engine: it takes calls, or does not answer."""

    silent: bool = False
    freed: list[int] = field(default_factory=list)

    async def call(self, method: str, path: str, body: bytes, *, timeout_s: float) -> Answer:
        if self.silent:
            raise UpstreamFailed(Loss.TIMEOUT, "silent")
        self.freed.append(msgspec.json.decode(body, type=FreeCacheRequest).remote_session_id)
        return Answer(200, b"")


async def end_one(leases: Leases, engine: Engine, session: int) -> None:
    """A request ends whose KV nobody has read."""
    with leases.open() as lease:
        lease.held = HeldCache(Node("http://p", cast(Any, engine)), "http://d", session)
    await leases.close()


async def test_what_is_held_is_freed_once() -> None:
    leases, engine = Leases(), Engine()
    await end_one(leases, engine, 7)
    assert await leases.collect() == 0
    assert engine.freed == [7]


async def test_what_could_not_be_freed_is_freed_by_collect() -> None:
    leases, engine = Leases(), Engine(silent=True)
    await end_one(leases, engine, 7)
    assert await leases.collect() == 1
    engine.silent = False
    assert await leases.collect() == 0
    assert engine.freed == [7]


async def test_silent_engines_do_not_keep_others_from_being_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_ORPHANS", 3)
    leases, silent, engine = Leases(), Engine(silent=True), Engine()
    for session in range(5):
        await end_one(leases, silent, session)
    await end_one(leases, engine, 7)
    assert engine.freed == [7]
    assert await leases.collect() <= 3
    await asyncio.sleep(0)
