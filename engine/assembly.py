"""Builds an engine core from its settings: model, pool, transports, scheduler, hand-offs."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import msgspec
import zmq

from engine.cache.leases import LeaseTable
from engine.cache.pool import BlockPool
from engine.cache.prefix import PrefixCache
from engine.core import ModelInfo, Role
from engine.engine import Engine
from engine.messages import CoreSettings
from engine.migrate.giving import Giving
from engine.migrate.links import LinkPolicy, Links
from engine.migrate.taking import Taking
from engine.requests import Requests
from engine.run.executor import Executor, blocks_within
from engine.run.local import LocalExecutor
from engine.scheduler import Scheduler
from kernels import cpu
from kvtransfer import epochs
from kvtransfer.layout import KVLayout
from kvtransfer.memory import Region
from kvtransfer.transfer import Endpoint, open_endpoint

logger = logging.getLogger(__name__)

RENEWALS_PER_LEASE = 4
# Even streams are what a decode engine is for, also while it reads a prompt. So few rows cost little more than one: of
# packed weights they are multiplied another way than more are.
TOKENS_BESIDE_STREAMS = 32


@dataclass(slots=True)
class Assembly:
    """An engine core's parts, and the order in which they end."""

    model: ModelInfo
    engine: Engine
    links: Links
    endpoints: dict[str, Endpoint]
    region: Region

    def close(self) -> None:
        self.links.close()
        for endpoint in self.endpoints.values():
            endpoint.close()
        self.engine.executor.detach()
        self.region.close()


def assemble(settings: CoreSettings, context: zmq.Context[zmq.Socket[bytes]], incarnation: str) -> Assembly:
    """Loads the model and builds everything around it. ValueError, MemoryError and OSError say what to change."""
    executor = _load(settings)
    logger.debug("weights loaded")
    layout = executor.layout(blocks_within(executor, settings.kv_cache_bytes))
    region = Region.allocate(epochs.region_bytes(layout))
    executor.attach(region.buffer[: layout.pool_bytes])
    logger.debug("pool allocated")
    executor.warm_up()
    logger.debug("warmed up")
    model = _model_info(executor, layout)
    endpoints = {
        name: open_endpoint(name, region, settings.transfer_host, copy=cpu.copy_ranges) for name in settings.transports
    }
    links = Links(context, settings.transfer_host, incarnation, model, layout, endpoints, _policy(settings))
    engine = _engine(settings, executor, model, layout, region, links, incarnation)
    return Assembly(model, engine, links, endpoints, region)


def _load(settings: CoreSettings) -> LocalExecutor:
    executor = LocalExecutor(
        settings.model,
        served_name=settings.served_model_name,
        dtype=settings.dtype,
        device=settings.device,
        block_size=settings.block_size,
        num_threads=settings.num_threads,
        max_model_len=settings.max_model_len,
        cpu_cores=settings.cpu_cores,
        max_num_seqs=settings.max_num_seqs,
        quantization=settings.quantization,
    )
    if executor.model_info(1).device != "cpu" and settings.role is not Role.HYBRID:
        raise ValueError("no transport reads device memory yet: use --role hybrid on a GPU, or --device cpu")
    return executor


def _policy(settings: CoreSettings) -> LinkPolicy:
    return LinkPolicy(
        cluster_key=settings.cluster_key,
        transports=settings.transports,
        require_transport=settings.require_transport,
        reads=settings.role is not Role.PREFILL,
    )


def _engine(
    settings: CoreSettings,
    executor: Executor,
    model: ModelInfo,
    layout: KVLayout,
    region: Region,
    links: Links,
    incarnation: str,
) -> Engine:
    requests, pool = Requests(model), BlockPool(layout.num_blocks, layout.block_size)
    prefixes = PrefixCache(pool, settings.prefix_cache)
    scheduler = Scheduler(
        pool,
        prefixes,
        settings.max_num_seqs,
        settings.max_num_batched_tokens,
        beside_streams=TOKENS_BESIDE_STREAMS if settings.role is Role.DECODE else None,
        draft_rows=executor.draft_rows,
        max_draft_tokens=settings.max_draft_tokens,
    )
    leases = LeaseTable(epochs.owner_words(layout, region.buffer), settings.lease_seconds)
    giving = Giving(scheduler, requests, leases, links.send_to_reader, incarnation, settings.handoff_timeout)
    taking = Taking(
        scheduler,
        requests,
        layout,
        epochs.reader_words(layout, region.buffer),
        links.source_of,
        timeout_s=settings.handoff_timeout,
        renew_s=settings.lease_seconds / RENEWALS_PER_LEASE,
        local_tokens=settings.local_prefill_tokens,
    )
    links.on_source_lost = taking.source_lost
    return Engine(executor, scheduler, requests, giving, taking)


def _model_info(executor: Executor, layout: KVLayout) -> ModelInfo:
    """A sequence can be as long as the model and the whole pool allow; both limits are one number from here on."""
    model = executor.model_info(layout.num_blocks)
    longest = min(model.max_model_len, layout.num_blocks * layout.block_size)
    return msgspec.structs.replace(model, max_model_len=longest)
