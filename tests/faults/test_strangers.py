"""Strangers and liars: on the hand-off, the handshake, the KV wire and the control channel. The engine lives on."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import socket
import struct
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
import zmq

from kvtransfer.handshake import PROOF_BYTES, introduce
from kvtransfer.stream import receive_exactly
from tests.cluster.local_cluster import LocalCluster
from tests.faults.pairing import Offer, connect_body, initialize

pytestmark = pytest.mark.cluster

CLOSED_S = 10.0  # for an engine to close a connection
FRAME = struct.Struct("<IIQ")
STRANGER = "http://127.0.0.1:1"


@pytest.fixture
def offer(cluster: LocalCluster) -> Iterator[Offer]:
    """Prefill's, to an engine that is none; forgotten again afterwards."""
    url = cluster.url("prefill-1")
    yield initialize(url, STRANGER)
    assert _post(url, "/distserve/p2p_drop_connect", {"engine_id": url, "remote_engine_id": STRANGER})[0] == 200


def _migration(cluster: LocalCluster, **changes: Any) -> dict[str, Any]:
    return {
        "protocol": 2,
        "remote_engine_id": cluster.url("prefill-1"),
        "remote_session_id": 7,
        "remote_token_id": 42,
        "remote_block_ids": [0, 1],
        "is_dummy_prefill": False,
    } | changes


@pytest.mark.parametrize(
    "changes",
    [
        {},  # nobody holds that session
        {"remote_session_id": 2**53 - 1},
        {"remote_engine_id": STRANGER},
        {"remote_engine_id": ""},
        {"remote_session_id": -1},
        {"remote_session_id": 2**70},
        {"remote_session_id": "7"},
        {"remote_token_id": -1},
        {"remote_block_ids": [2**40]},
        {"remote_block_ids": "all"},
        {"protocol": 9},
        {"is_dummy_prefill": 1},
    ],
    ids=str,
)
def test_a_forged_migration_is_a_400_and_nothing_else_changes(changes: dict[str, Any], cluster: LocalCluster) -> None:
    body = {"model": cluster.model, "prompt": "Hello", "migration_request": _migration(cluster, **changes)}
    status, reply = _post(cluster.url("decode-1"), "/v1/completions", body)
    assert status == 400
    assert reply["error"]["type"] == "invalid_request_error"


def test_a_session_is_taken_once(cluster: LocalCluster) -> None:
    """A stale migration_request: its lease has been read, released, and is gone."""
    prefill, decode = cluster.url("prefill-1"), cluster.url("decode-1")
    body = {"model": cluster.model, "prompt": "The capital of France is", "temperature": 0}
    status, given = _post(prefill, "/v1/completions", body | {"with_cache": True, "preserve_cache": True})
    assert status == 200
    session, first_token = int(given["id"]), given["remote_token_ids"][0]
    migration = _migration(cluster, remote_session_id=session, remote_token_id=first_token)
    taken = body | {"max_tokens": 4, "migration_request": migration}
    forged = _migration(cluster, remote_session_id=session, remote_token_id=first_token + 1)
    assert _post(decode, "/v1/completions", body | {"migration_request": forged})[0] == 400
    status, given = _post(prefill, "/v1/completions", body | {"with_cache": True, "preserve_cache": True})
    migration["remote_session_id"] = int(given["id"])
    status, reply = _post(decode, "/v1/completions", taken)
    assert (status, reply["choices"][0]["text"][:6]) == (200, " Paris")
    assert _post(decode, "/v1/completions", taken)[0] == 400


@pytest.mark.parametrize(
    "header", ["", "{", '{"type":"give"}', '{"type":"take","session":-1,"peer":"x"}', "[]", "null"]
)
def test_a_malformed_handoff_header_is_a_400(header: str, cluster: LocalCluster) -> None:
    body = {"model": cluster.model, "prompt": "Hello"}
    status, _ = _post(cluster.url("prefill-1"), "/v1/completions", body, {"X-Tandem-Handoff": header})
    assert status == 400


@pytest.mark.parametrize(
    "info",
    ["", "{}", "[]", '"x"', "{", '{"tandem": 1}', '{"tandem": 99}', "x" * 100_000],
    ids=["empty", "object", "list", "string", "cut", "bare", "future", "long"],
)
def test_a_stranger_cannot_connect(info: str, cluster: LocalCluster, offer: Offer) -> None:
    body = connect_body(STRANGER, "tcp://127.0.0.1:1", info)
    status, reply = _post(cluster.url("decode-1"), "/distserve/p2p_connect", body)
    assert (status, reply["code"], reply["object"]) == (400, 400, "error")


@pytest.mark.parametrize(
    "change",
    [
        {"model": "other"},
        {"layout": {"num_layers": 1}},
        {"layout": {"num_blocks": -1}},
        {"secret": "no hex"},
        {"offers": 3},
    ],
    ids=str,
)
def test_engines_that_do_not_fit_are_not_connected(change: dict[str, Any], cluster: LocalCluster, offer: Offer) -> None:
    decode = cluster.url("decode-1")
    initialize(decode, STRANGER)
    layout = offer.info["layout"] | change.get("layout", {})
    info = offer.info | change | {"layout": layout, "engine_id": STRANGER}
    status, reply = _post(decode, "/distserve/p2p_connect", connect_body(STRANGER, offer.zmq_address, info))
    assert status in (400, 409), reply
    assert _post(decode, "/distserve/p2p_drop_connect", {"engine_id": decode, "remote_engine_id": STRANGER})[0] == 200


def test_nobody_connects_without_having_been_introduced(cluster: LocalCluster, offer: Offer) -> None:
    info = offer.info | {"engine_id": STRANGER}
    body = connect_body(STRANGER, offer.zmq_address, info)
    assert _post(cluster.url("decode-1"), "/distserve/p2p_connect", body)[0] == 409


@pytest.mark.parametrize(
    "said",
    [b"", b"\x00", b"GET / HTTP/1.1\r\n\r\n", b"\xff\xff" + b"x" * 70_000, b"\x00\x04abcd", b"\x01\x00" + bytes(256)],
    ids=["nothing", "one byte", "http", "oversized", "no hello", "zeros"],
)
def test_garbage_on_the_kv_wire_is_closed_on(said: bytes, offer: Offer) -> None:
    with socket.create_connection(offer.tcp, timeout=CLOSED_S) as sock:
        _end(sock, said)


@pytest.mark.parametrize(
    "frame",
    [
        FRAME.pack(0, 1, 100)[:7],
        FRAME.pack(0, 3000, 100),
        FRAME.pack(0, 1, 1 << 40),
        FRAME.pack(0, 1, 100) + struct.pack("<qq", -50, 100),
        FRAME.pack(0, 1, 100) + struct.pack("<qq", 1 << 50, 100),
        FRAME.pack(0, 1, 100) + struct.pack("<qq", 0, 99),
        FRAME.pack(0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF),
    ],
    ids=["truncated", "too many", "too long", "negative", "outside", "unequal", "ones"],
)
async def test_a_reader_that_asks_for_what_it_may_not_is_closed_on(
    frame: bytes, cluster: LocalCluster, offer: Offer
) -> None:
    loop, secret = asyncio.get_running_loop(), bytes.fromhex(offer.info["secret"])
    with socket.socket() as sock:
        sock.setblocking(False)
        await loop.sock_connect(sock, offer.tcp)
        key = hmac.digest(b"", secret, "sha256")
        expected = await introduce(sock, "tcp", STRANGER, cluster.url("prefill-1"), key)
        assert await receive_exactly(sock, PROOF_BYTES) == expected
        await loop.sock_sendall(sock, frame)
        sock.shutdown(socket.SHUT_WR)
        async with asyncio.timeout(CLOSED_S):
            with contextlib.suppress(ConnectionError):
                assert await loop.sock_recv(sock, 100) == b""


@pytest.mark.parametrize("said", [b"", b"\xff" * 10_000, bytes(10_000), b"\xff" + bytes(8) + b"\x7f\x03"], ids=len)
def test_garbage_on_the_control_port_is_closed_on(said: bytes, offer: Offer) -> None:
    host, port = offer.zmq_address.removeprefix("tcp://").split(":")
    with socket.create_connection((host, int(port)), timeout=CLOSED_S) as sock:
        _end(sock, said)


@pytest.mark.parametrize("known", [False, True], ids=["stranger", "peer"])
def test_malformed_control_messages_are_dropped(known: bool, cluster: LocalCluster, offer: Offer) -> None:
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.setsockopt(zmq.LINGER, 1000)
        if known:
            dealer.setsockopt(zmq.ROUTING_ID, bytes.fromhex(offer.info["routing_id"]))
        dealer.connect(offer.zmq_address)
        want = b"\x95\x01\x92\x07\x00\xa4none\x05\xc3"
        for frames in (
            [b""],
            [b"\xc1"],
            [b"\x93\x01\x02\x03"],
            [b"x" * 100_000],
            [b"a", b"b"],
            [want],
            [b"\x92\x05\x91"],
        ):
            dealer.send_multipart(frames)
        assert dealer.poll(500) == 0 or known


def _end(sock: socket.socket, said: bytes) -> None:
    """Says it, and reads until the other side closes. A reset, with our bytes unread, is an end too."""
    with contextlib.suppress(ConnectionError):
        sock.sendall(said)
        while sock.recv(4096):
            pass


def _post(url: str, path: str, body: Any, headers: dict[str, str] | None = None) -> tuple[int, dict[str, Any]]:
    request = urllib.request.Request(
        url + path, json.dumps(body).encode(), {"Content-Type": "application/json"} | (headers or {})
    )
    try:
        with urllib.request.urlopen(request, timeout=30) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)
