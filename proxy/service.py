"""The parts of one proxy, put together: made when the application starts, closed when it ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from aiohttp import web

from engine.api.distserve import MigrationRequest, RDMAConfig
from kvtransfer.protocol import MigrationProtocol, RDMALinkType
from proxy.admission import Admission
from proxy.config import ProxySettings
from proxy.dispatch import Dispatcher, DispatchPolicy
from proxy.handshake import LinkTerms
from proxy.health import Prober
from proxy.keys import Keys
from proxy.leases import Leases
from proxy.links import Links
from proxy.metrics import Metrics
from proxy.nodes import NodeTable
from proxy.upstream import Upstream, UpstreamLimits

SWEEP_INTERVAL_S = 0.5


@dataclass(slots=True)
class Service:
    settings: ProxySettings
    nodes: NodeTable
    links: Links
    leases: Leases
    dispatcher: Dispatcher
    metrics: Metrics
    admission: Admission
    keys: Keys
    key_line: bytes  # the header that engines are shown; empty without a cluster key

    def upstream(self, url: str) -> Upstream:
        """Connections to one engine. Raises InvalidRequest for an unusable URL."""
        return Upstream(url, self.settings.cluster_key_text, upstream_limits(self.settings))


SERVICE = web.AppKey("service", Service)


@asynccontextmanager
async def serving(settings: ProxySettings) -> AsyncIterator[Service]:
    service = assemble(settings)
    prober = Prober(service.nodes, settings.probe_interval, settings.probe_timeout, settings.node_ttl)

    def follow() -> None:
        prober.follow()
        service.links.follow(service.nodes.all())

    service.nodes.on_change = follow
    sweeper = asyncio.create_task(_sweep(service.nodes), name="sweep")
    try:
        yield service
    finally:
        sweeper.cancel()
        prober.close()
        await service.links.close()
        await service.leases.close()
        service.nodes.close()


def assemble(settings: ProxySettings) -> Service:
    limits, key = upstream_limits(settings), settings.cluster_key_text
    nodes = NodeTable(settings.routing_strategy, lambda url: Upstream(url, key, limits))
    links, leases, metrics = Links(link_terms(settings)), Leases(), Metrics()
    return Service(
        settings=settings,
        nodes=nodes,
        links=links,
        leases=leases,
        dispatcher=Dispatcher(nodes, links, leases, metrics, dispatch_policy(settings)),
        metrics=metrics,
        admission=Admission(settings.max_inflight, settings.max_queue, settings.queue_timeout),
        keys=Keys(settings),
        key_line=f"Authorization: Bearer {key}\r\n".encode() if key else b"",
    )


def upstream_limits(settings: ProxySettings) -> UpstreamLimits:
    return UpstreamLimits(
        connect_s=settings.connect_timeout,
        first_byte_s=settings.request_timeout,
        idle_s=settings.idle_timeout,
        max_idle=settings.max_idle_connections,
        max_connections=settings.max_connections,
    )


def link_terms(settings: ProxySettings) -> LinkTerms:
    link_type = RDMALinkType.IB if settings.link_type == "IB" else RDMALinkType.ROCE
    return LinkTerms(
        protocol=MigrationProtocol[settings.migration_protocol],
        rdma=RDMAConfig(with_gdr=not settings.disable_gdr, link_type=link_type),
        deadline_s=settings.link_timeout,
    )


def dispatch_policy(settings: ProxySettings) -> DispatchPolicy:
    migration = MigrationRequest(
        protocol=MigrationProtocol[settings.migration_protocol],
        remote_engine_id="",
        remote_session_id=0,
        remote_token_id=0,
        remote_block_ids=[],
        is_dummy_prefill=settings.dummy_prefill,
    )
    handoff = "sequential" if settings.dummy_prefill else settings.handoff
    return DispatchPolicy(settings.serving_strategy != "Hybrid", handoff, migration)


async def _sweep(nodes: NodeTable) -> None:
    while True:
        await asyncio.sleep(SWEEP_INTERVAL_S)
        nodes.sweep()
