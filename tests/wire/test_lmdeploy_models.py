"""LMDeploy's own models read every body that we write, and what they write is read by ours, with nothing lost."""

from __future__ import annotations

import json
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from engine.api import distserve
from engine.api.decoding import decode_json
from engine.api.openai import ChatRequest, CompletionRequest, decode_request
from kvtransfer.protocol import ConnectionStatus, MigrationProtocol
from tests.unit.api_server import ApiServer, ids, serve
from tests.unit.fake_core import endpoint_info, says
from tests.wire.lmdeploy_cluster import lmdeploy_python

P, D = "http://127.0.0.1:23333", "http://127.0.0.1:23334"
CONFIG = distserve.EngineConfig(block_size=64, num_gpu_blocks=100)
ENDPOINT = distserve.EngineEndpoint("tcp://127.0.0.1:5555")
RANKS = [distserve.TransferEndpoint(MigrationProtocol.RDMA, msgspec.json.encode(endpoint_info(D)).decode())]
MESSAGES = [{"role": "user", "content": "x"}]
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"

BODIES: list[tuple[str, Any]] = [
    ("DistServeEngineConfig", CONFIG),
    (
        "DistServeInitRequest",
        distserve.InitializeRequest(
            local_engine_id=P,
            local_engine_config=CONFIG,
            remote_engine_id=D,
            remote_engine_config=CONFIG,
            protocol=MigrationProtocol.RDMA,
            rdma_config=distserve.RDMAConfig(),
        ),
    ),
    (
        "DistServeInitResponse",
        distserve.InitializeResponse(
            status=ConnectionStatus.SUCCESS, engine_endpoint_info=ENDPOINT, kvtransfer_endpoint_info=RANKS
        ),
    ),
    (
        "DistServeConnectionRequest",
        distserve.ConnectRequest(
            protocol=MigrationProtocol.NVLINK,
            remote_engine_id=D,
            remote_engine_endpoint_info=ENDPOINT,
            remote_kvtransfer_endpoint_info=RANKS,
        ),
    ),
    ("DistServeConnectionResponse", distserve.ConnectResponse(ConnectionStatus.SUCCESS)),
    ("DistServeDropConnectionRequest", distserve.DropConnectRequest(P, D)),
    ("DistServeCacheFreeRequest", distserve.FreeCacheRequest(P, distserve.MAX_SESSION)),
    (
        "MigrationRequest",
        distserve.MigrationRequest(
            protocol=MigrationProtocol.TCP,
            remote_engine_id=P,
            remote_session_id=distserve.MAX_SESSION,
            remote_token_id=42,
            remote_block_ids=[5, 6],
        ),
    ),
    ("Status", distserve.Status(role=distserve.EngineRole.PREFILL, models=["m"], latency=[0.1], speed=3)),
    ("Node", distserve.Node(url=P, status=distserve.Status(models=["m"]))),
    ("Node", distserve.Node(url=P)),
]


class Models:
    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def read(self, kind: str, body: Any) -> Any:
        """`body` as LMDeploy's `kind` reads it and writes it again."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps({"kind": kind, "body": body}), file=self._process.stdin, flush=True)
        answer = json.loads(self._process.stdout.readline())
        assert "error" not in answer, answer["error"]
        return answer["dump"]


@pytest.fixture(scope="module")
def models() -> Iterator[Models]:
    command = [lmdeploy_python(), "-P", str(Path(__file__).with_name("lmdeploy_models.py"))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield Models(process)


@pytest.fixture
async def engine() -> AsyncIterator[ApiServer]:
    async with serve(says([*ids("one two"), 2])) as server:
        yield server


@pytest.mark.parametrize(("kind", "ours"), BODIES, ids=lambda value: value if isinstance(value, str) else "")
def test_they_read_what_we_write_and_we_read_what_they_write(kind: str, ours: Any, models: Models) -> None:
    dump = models.read(kind, json.loads(msgspec.json.encode(ours)))
    assert decode_json(json.dumps(dump), type(ours)) == ours


async def test_engine_info(engine: ApiServer, models: Models) -> None:
    async with engine.http.get(engine.url + "/distserve/engine_info") as reply:
        dump = models.read("DistServeEngineConfig", await reply.json())
    assert dump == json.loads(msgspec.json.encode(distserve.EngineConfig(block_size=16, num_gpu_blocks=64)))


async def test_a_handshake_by_their_models(engine: ApiServer, models: Models) -> None:
    body = json.loads(msgspec.json.encode(BODIES[1][1]))
    status, reply = await engine.post("/distserve/p2p_initialize", models.read("DistServeInitRequest", body))
    assert status == 200
    initialized = models.read("DistServeInitResponse", reply)
    connect = {
        "protocol": body["protocol"],
        "remote_engine_id": P,
        "remote_engine_endpoint_info": initialized["engine_endpoint_info"],
        "remote_kvtransfer_endpoint_info": initialized["kvtransfer_endpoint_info"],
    }
    status, reply = await engine.post("/distserve/p2p_connect", models.read("DistServeConnectionRequest", connect))
    assert status == 200
    assert models.read("DistServeConnectionResponse", reply) == {"status": 1}


@pytest.mark.parametrize(
    ("theirs", "ours", "body"),
    [
        ("CompletionRequest", CompletionRequest, {"model": "m", "prompt": "x"}),
        ("CompletionRequest", CompletionRequest, {"model": "m", "prompt": [1, 2], "max_tokens": 3, "stop": "y"}),
        ("ChatCompletionRequest", ChatRequest, {"model": "m", "messages": MESSAGES}),
        (
            "ChatCompletionRequest",
            ChatRequest,
            {"model": "m", "messages": MESSAGES, "stream": True, "stream_options": {"include_usage": True}},
        ),
    ],
)
async def test_a_request_with_all_their_defaults_written_out_is_served(
    theirs: str, ours: type[Any], body: dict[str, Any], engine: ApiServer, models: Models
) -> None:
    dump = models.read(theirs, body) | {"model": "smollm2"}
    assert len(dump) > 20, "the defaults are not written out"
    decode_request(json.dumps(dump).encode(), ours)
    prefill = dump | {"max_tokens": 1, "stream": False, "with_cache": True, "preserve_cache": True}
    path = CHAT if ours is ChatRequest else TEXT
    status, reply = await engine.post(path, prefill)
    assert status == 200, reply
    assert int(reply["id"]) > 0
    migration = models.read("MigrationRequest", json.loads(msgspec.json.encode(BODIES[7][1])))
    decode = dump | {"stream": False, "migration_request": migration}
    status, reply = await engine.post(path, decode)
    assert status == 200, reply


@pytest.mark.parametrize("logprobs", [False, True])
@pytest.mark.parametrize(("path", "kind"), [(TEXT, "CompletionResponse"), (CHAT, "ChatCompletionResponse")])
async def test_they_read_our_answers(path: str, kind: str, logprobs: bool, engine: ApiServer, models: Models) -> None:
    asked: dict[str, Any] = {"messages": "x", "logprobs": logprobs} if path == CHAT else {"prompt": "x"}
    asked |= {"logprobs": 1} if logprobs and path == TEXT else {}
    _, whole = await engine.post(path, asked)
    read = models.read(kind, whole)
    assert read["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    assert (read["choices"][0]["logprobs"] is not None) == logprobs
    for line in (await engine.post_text(path, asked | {"stream": True})).splitlines():
        if line.startswith("data: {"):
            event = json.loads(line.removeprefix("data: "))
            read = models.read(kind.replace("Response", "StreamResponse"), event)
            assert read["choices"][0]["finish_reason"] == event["choices"][0]["finish_reason"]


async def test_they_read_our_list_of_models(engine: ApiServer, models: Models) -> None:
    async with engine.http.get(engine.url + "/v1/models") as reply:
        read = models.read("ModelList", await reply.json())
    assert [card["id"] for card in read["data"]] == ["smollm2"]
