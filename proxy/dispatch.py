"""How one request is answered: by one engine, or by a prefill and a decode engine together.

    choose ─▶ start ─▶ first bytes ─▶ deliver          an attempt owns one lease
       ▲        └── the engine failed ──┐
       └──── another engine, a few times┘               until the first byte nobody has seen anything

Concurrent order, between engines of ours: both get the client's bytes at once, with a private header that names the
session and the peer; decode pulls while prefill computes. Sequential order, LMDeploy's: prefill whole, one token, then
decode with `migration_request`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from engine.api.distserve import (
    HANDOFF_HEADER,
    EngineRole,
    GiveHeader,
    HandoffHeader,
    MigrationRequest,
    TakeHeader,
    encode_handoff,
)
from engine.api.errors import Declined, TandemError, Unavailable
from proxy.exchange import Exchange, Loss, UpstreamFailed
from proxy.handshake import LinkFailed
from proxy.leases import HeldCache, Lease, Leases, free_cache
from proxy.links import Link, Links
from proxy.metrics import Metrics
from proxy.nodes import Node, NodeTable
from proxy.relay import BufferedReply, Outcome, buffer
from proxy.requests import Call, decode_body, prefill_body, read_prefill_reply

ATTEMPTS = 4
REFUSED_MIGRATION = (400, 409)  # decode's word for KV that it cannot have
DELIVERED_ATTEMPTS = 2  # a request that breaks engines must not be shown to all of them
TELL_AGAIN_S = (0.0, 0.1, 0.4, 1.5, 5.0)  # decode may hear that prefill failed before it has the request itself

Deliver = Callable[[Exchange | BufferedReply], Awaitable[Outcome]]


@dataclass(frozen=True, slots=True)
class DispatchPolicy:
    disaggregate: bool  # where there are prefill and decode engines
    handoff: str  # auto | concurrent | sequential
    migration: MigrationRequest  # protocol and is_dummy_prefill of every hand-off in LMDeploy's order


@dataclass(frozen=True, slots=True)
class Shared:
    """A prefill and a decode engine for one request."""

    prefill: Node
    decode: Node


class AttemptFailed(Exception):
    """An engine failed before the client saw anything. `reply` is its own 5xx, if it managed one."""

    def __init__(
        self, node: Node, exchange: Exchange, error: TandemError | None, reply: BufferedReply | None = None
    ) -> None:
        super().__init__(node.url)
        self.node, self.exchange, self.error, self.reply = node, exchange, error, reply

    @property
    def delivered(self) -> bool:
        """Whether the engine may have failed over the request."""
        out = isinstance(self.error, UpstreamFailed) and self.error.loss is Loss.NODE_OUT
        return self.exchange.sent and not out


class Refused(TandemError):
    """A prefill engine's own refusal, to be passed on to the client."""

    def __init__(self, reply: BufferedReply) -> None:
        super().__init__("refused by the prefill engine")
        self.reply = reply


class Dispatcher:
    def __init__(
        self, nodes: NodeTable, links: Links, leases: Leases, metrics: Metrics, policy: DispatchPolicy
    ) -> None:
        self._nodes, self._links, self._leases = nodes, links, leases
        self._metrics, self._policy = metrics, policy

    async def answer(self, call: Call, deliver: Deliver) -> Outcome:
        """Exactly one answer, through `deliver`. Raises TandemError when there is none to deliver."""
        tried: set[str] = set()
        failure: AttemptFailed | None = None
        delivered = 0
        for _ in range(ATTEMPTS):
            try:
                return await self._attempt(call, tried, deliver)
            except Refused as refusal:
                return await deliver(refusal.reply)
            except AttemptFailed as failed:
                failure = failed
            except Unavailable:
                if failure is None:
                    raise
                break  # nobody is left to try: what the last one said is the answer
            tried.add(failure.node.url)
            delivered += failure.delivered
            if delivered >= DELIVERED_ATTEMPTS:
                break
            self._metrics.retries += 1
        assert failure is not None
        if failure.reply is not None:
            return await deliver(failure.reply)
        raise failure.error or Unavailable("no engine answered")

    async def _attempt(self, call: Call, tried: set[str], deliver: Deliver) -> Outcome:
        with self._leases.open() as lease:
            began = time.monotonic()
            chosen = self._choose(call, tried, lease)
            decode = chosen.decode if isinstance(chosen, Shared) else chosen
            exchange = await self._start(call, chosen, lease)
            outcome = await deliver(exchange)
            if outcome.whole and outcome.status < 300:
                lease.held = None  # decode has read it, or never needed it
                decode.served(time.monotonic() - began)
            elif isinstance(exchange.error, UpstreamFailed):
                decode.failed(exchange.error)
            return outcome

    # who

    def _choose(self, call: Call, tried: set[str], lease: Lease) -> Shared | Node:
        """Reserves what it returns. Raises NotFound, Unavailable."""
        nodes = self._nodes.serving(call.model)
        up = [node for node in nodes if node.up and node.url not in tried]
        if not up:
            raise Unavailable(f"No engine for {call.model or 'this model'} is up now", code="no_engine")
        if call.shared and self._policy.disaggregate and not _hybrid_is_idler(up):
            shared = self._choose_shared(up, lease)
            if shared is not None:
                return shared
        for role in (EngineRole.HYBRID, EngineRole.DECODE, EngineRole.PREFILL):  # any engine can serve a whole request
            pool = [node for node in up if node.role is role]
            if pool:
                return lease.took(self._nodes.reserve(pool))
        raise AssertionError("every node has a role")

    def _choose_shared(self, up: list[Node], lease: Lease) -> Shared | None:
        """None when no prefill engine can hand over to any decode engine now."""
        prefills = [node for node in up if node.role is EngineRole.PREFILL]
        decodes = [node for node in up if node.role is EngineRole.DECODE]
        while prefills and decodes:
            decode = self._nodes.reserve(decodes)
            linked = [node for node in prefills if not self._links.failing(node, decode)]
            if linked:
                return Shared(lease.took(self._nodes.reserve(linked)), lease.took(decode))
            self._metrics.handoffs["unlinked"] += 1
            self._nodes.unreserve(decode)
            decodes.remove(decode)
        return None

    # how

    async def _start(self, call: Call, chosen: Shared | Node, lease: Lease) -> Exchange:
        """Returns with the answer's first bytes there. Raises AttemptFailed, Refused, Overloaded."""
        if not isinstance(chosen, Shared):
            return await self._first_bytes(chosen, self._begin(lease, chosen, call, call.body))
        try:
            link = await self._links.ready(chosen.prefill, chosen.decode)
        except LinkFailed:
            self._metrics.handoffs["unlinked"] += 1
            return await self._whole_on_decode(call, chosen, lease)
        if self._is_concurrent(link):
            return await self._concurrent(call, chosen, lease)
        return await (self._sequential if call.single else self._whole_on_decode)(call, chosen, lease)

    def _is_concurrent(self, link: Link) -> bool:
        return self._policy.handoff == "concurrent" or (self._policy.handoff == "auto" and link.concurrent)

    async def _whole_on_decode(self, call: Call, chosen: Shared, lease: Lease) -> Exchange:
        lease.release(chosen.prefill)
        return await self._first_bytes(chosen.decode, self._begin(lease, chosen.decode, call, call.body))

    async def _concurrent(self, call: Call, chosen: Shared, lease: Lease) -> Exchange:
        """Decode is asked first: it reserves its blocks before prefill has anything to announce."""
        self._metrics.handoffs["concurrent"] += 1
        prefill, decode = chosen.prefill, chosen.decode
        take = self._begin(lease, decode, call, call.body, TakeHeader(session=lease.session, peer=prefill.url))
        give = self._begin(lease, prefill, call, call.body, GiveHeader(session=lease.session, peer=decode.url))
        lease.watch(self._follow_prefill(chosen, lease, give, take))
        return await self._first_bytes(decode, take)

    async def _follow_prefill(self, chosen: Shared, lease: Lease, give: Exchange, take: Exchange) -> None:
        """Prefill's answer is for us alone: that it has come, or that decode must do without."""
        prefill = chosen.prefill
        try:
            reply = await buffer(give)
        except UpstreamFailed as error:
            prefill.failed(error)
        else:
            prefill.answered(reply.head.status)
            if reply.head.status < 300:
                prefill.served(time.monotonic() - give.started_at)
                lease.held = HeldCache(prefill, chosen.decode.url, lease.session)
                lease.release(prefill)
                return
            if reply.head.status == Declined.status:
                lease.release(prefill)
                self._metrics.handoffs["declined"] += 1
                return
            if reply.head.status == 429 and not take.first_byte_at:  # what decode has begun to say stands
                take.fail(Refused(reply))
                return
        lease.release(prefill)
        self._metrics.handoffs["recomputed"] += 1
        await self._tell_decode(chosen, lease.session, take)

    async def _tell_decode(self, chosen: Shared, session: int, take: Exchange) -> None:
        """That prefill will not deliver, until it answers."""
        for pause_s in TELL_AGAIN_S:
            await asyncio.sleep(pause_s)
            if take.first_byte_at or take.finished or take.error:
                return
            await free_cache(chosen.decode, chosen.prefill.url, session)

    async def _sequential(self, call: Call, chosen: Shared, lease: Lease) -> Exchange:
        self._metrics.handoffs["sequential"] += 1
        if self._policy.migration.is_dummy_prefill:
            migration: MigrationRequest | None = self._migration(chosen)
        else:
            migration = await self._prefill(call, chosen, lease)
        lease.release(chosen.prefill)
        if migration is None:
            return await self._whole_on_decode(call, chosen, lease)
        body = decode_body(call.body, migration)
        exchange = await self._first_bytes(chosen.decode, self._begin(lease, chosen.decode, call, body))
        if exchange.head is None or exchange.head.status not in REFUSED_MIGRATION:
            return exchange
        self._metrics.handoffs["recomputed"] += 1
        exchange.close()
        lease.let_go()  # prefill had nothing against the request, but it may have died since: decode can do without it
        return await self._whole_on_decode(call, chosen, lease)

    async def _prefill(self, call: Call, chosen: Shared, lease: Lease) -> MigrationRequest | None:
        """The hand-off that prefill offers. Raises Refused with what it says against the request."""
        prefill = chosen.prefill
        give = await self._first_bytes(prefill, self._begin(lease, prefill, call, prefill_body(call.body, call.chat)))
        try:
            reply = await buffer(give)
        except UpstreamFailed as error:
            prefill.failed(error)
            raise AttemptFailed(prefill, give, error) from None
        if reply.head.status >= 300:
            raise Refused(reply)
        prefill.served(time.monotonic() - give.started_at)
        migration = read_prefill_reply(reply.body).migration(self._migration(chosen))
        if migration is None:
            self._metrics.handoffs["recomputed"] += 1
        else:
            lease.held = HeldCache(prefill, chosen.decode.url, migration.remote_session_id)
        return migration

    def _migration(self, chosen: Shared) -> MigrationRequest:
        policy = self._policy.migration
        return MigrationRequest(
            protocol=policy.protocol,
            remote_engine_id=chosen.prefill.url,
            remote_session_id=0,
            remote_token_id=0,
            remote_block_ids=[],
            is_dummy_prefill=policy.is_dummy_prefill,
        )

    def _begin(
        self, lease: Lease, node: Node, call: Call, body: bytes, handoff: HandoffHeader | None = None
    ) -> Exchange:
        headers = call.headers
        if handoff is not None:
            headers += f"{HANDOFF_HEADER}: {encode_handoff(handoff)}\r\n".encode()
        return lease.began(node.upstream.begin("POST", call.path, headers, body))

    async def _first_bytes(self, node: Node, exchange: Exchange) -> Exchange:
        try:
            head = await exchange.reply()
            node.answered(head.status)
            if head.status >= 500:
                raise AttemptFailed(node, exchange, None, await buffer(exchange))
        except UpstreamFailed as error:
            node.failed(error)
            raise AttemptFailed(node, exchange, error) from None
        return exchange


def _hybrid_is_idler(nodes: list[Node]) -> bool:
    """Whether some hybrid engine has less to do than every decode engine; when they are even, the pair is chosen."""
    hybrids = [node.unfinished for node in nodes if node.role is EngineRole.HYBRID]
    decodes = [node.unfinished for node in nodes if node.role is EngineRole.DECODE]
    return bool(hybrids and decodes) and min(hybrids) < min(decodes)
