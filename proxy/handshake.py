"""How two engines are connected: LMDeploy's three rounds, and the teardown.

    engine_info ─▶ p2p_initialize ─▶ p2p_connect        within a round both engines are asked at once

What one engine says of itself is carried to the other unread, but for the mark that says whether an engine is ours.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from engine.api.decoding import decode_json
from engine.api.distserve import (
    ConnectRequest,
    ConnectResponse,
    DropConnectRequest,
    EngineConfig,
    InitializeRequest,
    InitializeResponse,
    RDMAConfig,
    TransferEndpoint,
    decode_engine_info,
)
from engine.api.errors import TandemError, Unavailable
from kvtransfer.protocol import ConnectionStatus, MigrationProtocol
from proxy.nodes import Node

log = logging.getLogger("proxy.links")

DROP_DEADLINE_S = 2.0

T = TypeVar("T")


class LinkFailed(Unavailable):
    """This pair cannot hand over now."""

    label = "link"


@dataclass(frozen=True, slots=True)
class LinkTerms:
    """What the proxy asks of engines at every handshake."""

    protocol: MigrationProtocol
    rdma: RDMAConfig
    deadline_s: float


class _Ours(msgspec.Struct, frozen=True):
    """What marks `endpoint_info` as written by an engine of ours."""

    tandem: int


class Handshake:
    def __init__(self, terms: LinkTerms) -> None:
        self._terms = terms

    async def run(self, prefill: Node, decode: Node) -> bool:
        """Links them; True when both are ours, so that they may run at once. Raises TandemError."""
        configs = await _both(self._engine_info(prefill), self._engine_info(decode))
        offers = await _both(
            self._initialize(prefill, decode, configs), self._initialize(decode, prefill, (configs[1], configs[0]))
        )
        await _both(self._connect(prefill, decode, offers[1]), self._connect(decode, prefill, offers[0]))
        return all(_is_ours(offer.kvtransfer_endpoint_info) for offer in offers)

    async def _engine_info(self, node: Node) -> EngineConfig:
        return decode_engine_info(await self._call(node, "GET", "engine_info"))

    async def _initialize(
        self, node: Node, peer: Node, configs: tuple[EngineConfig, EngineConfig]
    ) -> InitializeResponse:
        request = InitializeRequest(
            local_engine_id=node.url,
            local_engine_config=configs[0],
            remote_engine_id=peer.url,
            remote_engine_config=configs[1],
            protocol=self._terms.protocol,
            rdma_config=self._terms.rdma,
        )
        reply = decode_json(await self._call(node, "POST", "p2p_initialize", request), InitializeResponse)
        if reply.status is not ConnectionStatus.SUCCESS:
            raise LinkFailed(f"{node.url} refuses to be linked with {peer.url}")
        return reply

    async def _connect(self, node: Node, peer: Node, offer: InitializeResponse) -> None:
        request = ConnectRequest(
            protocol=self._terms.protocol,
            remote_engine_id=peer.url,
            remote_engine_endpoint_info=offer.engine_endpoint_info,
            remote_kvtransfer_endpoint_info=offer.kvtransfer_endpoint_info,
        )
        reply = decode_json(await self._call(node, "POST", "p2p_connect", request), ConnectResponse)
        if reply.status is not ConnectionStatus.SUCCESS:
            raise LinkFailed(f"{node.url} could not connect to {peer.url}")

    async def _call(self, node: Node, method: str, route: str, body: msgspec.Struct | None = None) -> bytes:
        content = b"" if body is None else msgspec.json.encode(body)
        path = f"/distserve/{route}"
        answer = await node.upstream.call(method, path, content, timeout_s=self._terms.deadline_s)
        if answer.status != 200:
            raise LinkFailed(f"{node.url}{path} answered {answer.status}: {answer.body[:200].decode(errors='replace')}")
        return answer.body


async def drop_link(node: Node, peer: str) -> None:
    """Tells `node` that `peer` is linked with it no more. One that cannot be told is gone, and its side with it."""
    body = msgspec.json.encode(DropConnectRequest(node.url, peer))
    try:
        await node.upstream.call("POST", "/distserve/p2p_drop_connect", body, timeout_s=DROP_DEADLINE_S)
    except TandemError as error:
        log.debug("%s was not told to drop %s: %s", node.url, peer, error.message)


def _is_ours(endpoints: list[TransferEndpoint]) -> bool:
    try:
        return bool(endpoints) and msgspec.json.decode(endpoints[0].endpoint_info, type=_Ours).tandem >= 1
    except (msgspec.DecodeError, UnicodeDecodeError):
        return False


async def _both(first: Coroutine[Any, Any, T], second: Coroutine[Any, Any, T]) -> tuple[T, T]:
    """Both, at once; the first failure ends the other."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = (group.create_task(first), group.create_task(second))
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return tasks[0].result(), tasks[1].result()
