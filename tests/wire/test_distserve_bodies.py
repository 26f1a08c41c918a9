"""Golden bodies of /distserve and /nodes: what LMDeploy's proxy sends and reads, byte for byte where it matters."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from engine.api import distserve
from engine.api.decoding import decode_json
from engine.api.errors import Conflict, InvalidRequest, NotFound, TandemError, flat_body
from engine.messages import Connect, Disconnect, Free, Initialize
from kvtransfer.protocol import ConnectionStatus, EndpointInfo, MigrationProtocol, RDMALinkType
from tests.unit.api_server import ApiServer, serve
from tests.unit.fake_core import endpoint_info, says

P, D = "http://127.0.0.1:23333", "http://127.0.0.1:23334"
ENGINE_CONFIG = {
    "tp_size": 1,
    "ep_size": 1,
    "dp_size": 1,
    "pp_size": None,
    "dp_rank": 0,
    "block_size": 64,
    "num_cpu_blocks": 0,
    "num_gpu_blocks": 100,
}
ENGINE_INFO = (
    rb'"{\"tp_size\":1,\"ep_size\":1,\"dp_size\":1,\"pp_size\":null,\"dp_rank\":0,\"block_size\":64,'
    rb'\"num_cpu_blocks\":0,\"num_gpu_blocks\":100}"'
)
INITIALIZE = {
    "local_engine_id": P,
    "local_engine_config": ENGINE_CONFIG,
    "remote_engine_id": D,
    "remote_engine_config": ENGINE_CONFIG,
    "protocol": 2,
    "rank": None,
    "tcp_config": None,
    "rdma_config": {"with_gdr": True, "link_type": 2},
    "nvlink_config": None,
}
INITIALIZED = {
    "status": 1,
    "engine_endpoint_info": {"zmq_address": "tcp://127.0.0.1:5555"},
    "kvtransfer_endpoint_info": [{"protocol": 2, "endpoint_info": "{}"}],
}
CONNECT = {
    "protocol": 2,
    "remote_engine_id": D,
    "remote_engine_endpoint_info": {"zmq_address": "tcp://127.0.0.1:5555"},
    "remote_kvtransfer_endpoint_info": [{"protocol": 2, "endpoint_info": "{}"}],
}
MIGRATION = {
    "protocol": 2,
    "remote_engine_id": P,
    "remote_session_id": 7,
    "remote_token_id": 42,
    "remote_block_ids": [5, 6],
    "is_dummy_prefill": False,
}
STATUS = {"role": 2, "models": ["m"], "unfinished": 0, "latency": [0.1], "speed": None}

GOLDEN: list[tuple[Any, Any]] = [
    (distserve.EngineConfig, ENGINE_CONFIG),
    (distserve.InitializeRequest, INITIALIZE),
    (distserve.InitializeResponse, INITIALIZED),
    (distserve.ConnectRequest, CONNECT),
    (distserve.ConnectResponse, {"status": 1}),
    (distserve.DropConnectRequest, {"engine_id": P, "remote_engine_id": D}),
    (distserve.DropConnectResponse, {"success": True}),
    (distserve.FreeCacheRequest, {"remote_engine_id": D, "remote_session_id": 7}),
    (distserve.FreeCacheResponse, {"status": "SUCCESS"}),
    (distserve.MigrationRequest, MIGRATION),
    (distserve.HandoffHeader, {"type": "give", "session": 123, "peer": D}),
    (distserve.HandoffHeader, {"type": "take", "session": 123, "peer": P}),
    (distserve.Status, STATUS),
    (distserve.Node, {"url": P, "status": STATUS}),
    (distserve.Node, {"url": P, "status": None}),
    (dict[str, distserve.Status], {P: STATUS}),
    (distserve.WarmupResponse, {"SUCCESS": True}),
    (
        distserve.FlatError,
        {"message": "no", "type": "not_found_error", "code": 404, "param": None, "object": "error"},
    ),
]


@pytest.mark.parametrize(("kind", "body"), GOLDEN)
def test_every_body_is_read_and_written_without_loss(kind: Any, body: Any) -> None:
    assert json.loads(msgspec.json.encode(decode_json(json.dumps(body), kind))) == body


@pytest.mark.parametrize(("kind", "body"), GOLDEN)
def test_unknown_fields_are_ignored(kind: Any, body: Any) -> None:
    decode_json(json.dumps({**body, "from_a_newer_version": 1} if kind != dict[str, distserve.Status] else body), kind)


def test_the_shortest_forms_mean_the_defaults() -> None:
    assert decode_json(b'{"url":"http://x"}', distserve.Node) == distserve.Node(url="http://x")
    status = decode_json(b"{}", distserve.Status)
    assert (status.role, status.models, status.unfinished, status.latency, status.speed) == (1, [], 0, [], None)


def test_enums_are_lmdeploys_integers() -> None:
    assert [*distserve.ServingStrategy] == [1, 2]
    assert [(role.name, role.value) for role in distserve.EngineRole] == [("HYBRID", 1), ("PREFILL", 2), ("DECODE", 3)]
    assert [(kind.name, kind.value) for kind in MigrationProtocol] == [("TCP", 1), ("RDMA", 2), ("NVLINK", 3)]
    assert [*RDMALinkType] == [1, 2]
    assert [*ConnectionStatus] == [1, 2]


def test_engine_info_is_json_in_a_json_string() -> None:
    config = distserve.EngineConfig(block_size=64, num_gpu_blocks=100)
    assert distserve.encode_engine_info(config) == ENGINE_INFO


@pytest.mark.parametrize("body", [ENGINE_INFO, json.dumps(ENGINE_CONFIG).encode()])
def test_engine_info_is_read_in_both_forms(body: bytes) -> None:
    assert distserve.decode_engine_info(body) == distserve.EngineConfig(block_size=64, num_gpu_blocks=100)


@pytest.mark.parametrize("body", [b"", b"7", b'"text"', b'"{}"', b"{}", b'"\\"twice\\""'])
def test_what_is_no_engine_info_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidRequest):
        distserve.decode_engine_info(body)


def test_errors_are_flat() -> None:
    assert flat_body(NotFound("gone")) == {
        "message": "gone",
        "type": "not_found_error",
        "code": 404,
        "param": None,
        "object": "error",
    }


# The routes, on a real socket in front of a stand-in core.


@pytest.fixture
async def engine() -> AsyncIterator[ApiServer]:
    async with serve(says([5, 2])) as server:
        yield server


async def test_engine_info_route(engine: ApiServer) -> None:
    async with engine.http.get(engine.url + "/distserve/engine_info") as reply:
        outer = await reply.json()
    assert isinstance(outer, str)
    assert json.loads(outer) == ENGINE_CONFIG | {"block_size": 16, "num_gpu_blocks": 64}


async def test_initialize_route(engine: ApiServer) -> None:
    status, reply = await engine.post("/distserve/p2p_initialize", INITIALIZE)
    assert status == 200
    assert set(reply) == {"status", "engine_endpoint_info", "kvtransfer_endpoint_info"}
    assert reply["status"] == 1
    assert reply["engine_endpoint_info"] == {"zmq_address": "tcp://127.0.0.1:5555"}
    (rank,) = reply["kvtransfer_endpoint_info"]
    assert rank["protocol"] == 2
    assert decode_json(rank["endpoint_info"], EndpointInfo) == endpoint_info(P)
    assert engine.core.commands == [Initialize(peer=D, me=P)]


async def test_connect_route(engine: ApiServer) -> None:
    info = msgspec.json.encode(endpoint_info(D)).decode()
    body = CONNECT | {"remote_kvtransfer_endpoint_info": [{"protocol": 2, "endpoint_info": info}]}
    assert await engine.post("/distserve/p2p_connect", body) == (200, {"status": 1})
    assert engine.core.commands == [Connect(D, "tcp://127.0.0.1:5555", info)]


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        ([], "names 0 ranks"),
        (["{}", "{}"], "names 2 ranks"),
        ([""], "not from a Tandem engine"),
        (["{}"], "not from a Tandem engine"),
        (['{"zmq":"lmdeploy"}'], "not from a Tandem engine"),
        ([msgspec.json.encode(endpoint_info("http://another")).decode()], "belongs to"),
        ([msgspec.json.encode(msgspec.structs.replace(endpoint_info(D), tandem=99)).decode()], "protocol 99"),
    ],
)
async def test_a_stranger_is_refused_and_nothing_changes(engine: ApiServer, ranks: list[str], expected: str) -> None:
    entries = [{"protocol": 2, "endpoint_info": info} for info in ranks]
    status, reply = await engine.post("/distserve/p2p_connect", CONNECT | {"remote_kvtransfer_endpoint_info": entries})
    assert (status, reply["code"], reply["object"]) == (400, 400, "error")
    assert expected in reply["message"]
    assert engine.core.commands == []


async def test_drop_connect_route(engine: ApiServer) -> None:
    body = {"engine_id": P, "remote_engine_id": D}
    assert await engine.post("/distserve/p2p_drop_connect", body) == (200, {"success": True})
    assert engine.core.commands == [Disconnect(D)]


async def test_free_cache_route(engine: ApiServer) -> None:
    body = {"remote_engine_id": D, "remote_session_id": 7}
    assert await engine.post("/distserve/free_cache", body) == (200, {"status": "SUCCESS"})
    assert engine.core.commands == [Free(D, 7)]


@pytest.mark.parametrize("refusal", [Conflict("another incarnation"), NotFound("no such peer")])
async def test_what_the_core_refuses_is_told_flat(engine: ApiServer, refusal: TandemError) -> None:
    engine.core.refusal = refusal
    status, reply = await engine.post("/distserve/free_cache", {"remote_engine_id": D, "remote_session_id": 7})
    assert (status, reply) == (refusal.status, flat_body(refusal))


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/distserve/p2p_initialize", {}),
        ("/distserve/p2p_initialize", INITIALIZE | {"protocol": 7}),
        ("/distserve/p2p_initialize", INITIALIZE | {"remote_engine_id": "http://" + "x" * 200}),
        ("/distserve/p2p_initialize", INITIALIZE | {"remote_engine_id": "http://é"}),
        ("/distserve/p2p_initialize", INITIALIZE | {"local_engine_id": "http://a\nb"}),
        ("/distserve/p2p_connect", CONNECT | {"remote_engine_id": ""}),
        ("/distserve/p2p_drop_connect", {"engine_id": 1, "remote_engine_id": D}),
        ("/distserve/free_cache", {"remote_engine_id": D, "remote_session_id": -1}),
        ("/distserve/free_cache", {"remote_engine_id": D, "remote_session_id": "7"}),
        ("/distserve/free_cache", []),
    ],
)
async def test_malformed_bodies_are_400_and_reach_no_core(engine: ApiServer, path: str, body: Any) -> None:
    status, reply = await engine.post(path, body)
    assert (status, reply["code"], reply["type"]) == (400, 400, "invalid_request_error")
    assert set(reply) == {"message", "type", "code", "param", "object"}
    assert engine.core.commands == []
