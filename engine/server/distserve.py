"""/distserve: how a proxy pairs engines and frees what they hold. The core does the work; errors are flat."""

from __future__ import annotations

from typing import TypeVar

import msgspec
from aiohttp import web

from engine.api.decoding import decode_json
from engine.api.distserve import (
    ConnectRequest,
    ConnectResponse,
    DropConnectRequest,
    DropConnectResponse,
    EngineConfig,
    EngineEndpoint,
    FreeCacheRequest,
    FreeCacheResponse,
    InitializeRequest,
    InitializeResponse,
    TransferEndpoint,
    encode_engine_info,
)
from engine.api.errors import InvalidRequest
from engine.messages import Connect, Disconnect, Free, Initialize
from engine.server.body import read_body
from engine.server.service import SERVICE
from kvtransfer.protocol import PROTOCOL_VERSION, ConnectionStatus, EndpointInfo

Body = TypeVar("Body")


async def engine_info(request: web.Request) -> web.Response:
    model = request.app[SERVICE].client.model
    config = EngineConfig(block_size=model.block_size, num_gpu_blocks=model.num_blocks)
    return _json_bytes(encode_engine_info(config))


async def p2p_initialize(request: web.Request) -> web.Response:
    body = await _decode(request, InitializeRequest)
    client = request.app[SERVICE].client
    reply = await client.call(Initialize(peer=body.remote_engine_id, me=body.local_engine_id))
    info = msgspec.msgpack.decode(reply, type=EndpointInfo)
    return _json(
        InitializeResponse(
            status=ConnectionStatus.SUCCESS,
            engine_endpoint_info=EngineEndpoint(client.control_address),
            kvtransfer_endpoint_info=[TransferEndpoint(body.protocol, msgspec.json.encode(info).decode())],
        )
    )


async def p2p_connect(request: web.Request) -> web.Response:
    body = await _decode(request, ConnectRequest)
    endpoint_info = _checked_endpoint_info(body)
    command = Connect(body.remote_engine_id, body.remote_engine_endpoint_info.zmq_address, endpoint_info)
    await request.app[SERVICE].client.call(command)
    return _json(ConnectResponse(ConnectionStatus.SUCCESS))


async def p2p_drop_connect(request: web.Request) -> web.Response:
    body = await _decode(request, DropConnectRequest)
    await request.app[SERVICE].client.call(Disconnect(body.remote_engine_id))
    return _json(DropConnectResponse())


async def free_cache(request: web.Request) -> web.Response:
    body = await _decode(request, FreeCacheRequest)
    await request.app[SERVICE].client.call(Free(body.remote_engine_id, body.remote_session_id))
    return _json(FreeCacheResponse())


def _checked_endpoint_info(body: ConnectRequest) -> str:
    """The one rank's `endpoint_info`. Raises InvalidRequest for what no engine of ours has written."""
    if len(body.remote_kvtransfer_endpoint_info) != 1:
        ranks = len(body.remote_kvtransfer_endpoint_info)
        raise InvalidRequest(f"remote_kvtransfer_endpoint_info names {ranks} ranks: exactly 1 can be connected")
    text = body.remote_kvtransfer_endpoint_info[0].endpoint_info
    try:
        info = decode_json(text, EndpointInfo)
    except InvalidRequest as error:
        raise InvalidRequest(f"endpoint_info is not from a Tandem engine: {error.message}") from error
    if info.tandem != PROTOCOL_VERSION:
        raise InvalidRequest(f"The peer speaks protocol {info.tandem}, and this engine {PROTOCOL_VERSION}")
    if info.engine_id != body.remote_engine_id:
        owner, named = info.engine_id[:200], body.remote_engine_id[:200]
        raise InvalidRequest(f"endpoint_info belongs to {owner!r}, and remote_engine_id says {named!r}")
    return text


async def _decode(request: web.Request, kind: type[Body]) -> Body:
    return decode_json(await read_body(request), kind)


def _json(message: msgspec.Struct) -> web.Response:
    return _json_bytes(msgspec.json.encode(message))


def _json_bytes(body: bytes) -> web.Response:
    return web.Response(body=body, content_type="application/json")
