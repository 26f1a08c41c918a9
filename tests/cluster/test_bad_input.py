"""Bad input, through the proxy and straight at an engine: one clear answer, nothing computed, and it serves on."""

from __future__ import annotations

import contextlib
import json
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.cluster.local_cluster import LocalCluster

# A server takes its time to give up on slow clients: theirs runs while all this is tested.
pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("slow_clients")]

DOORS = ("proxy", "prefill-1", "decode-1")
ANSWER_S = 20.0
TEXT, CHAT = "/v1/completions", "/v1/chat/completions"


@dataclass(frozen=True, slots=True)
class Reply:
    status: int
    head: str
    body: bytes

    def error(self) -> dict[str, Any]:
        """Of OpenAI's shape, or LMDeploy's flat one; either way with a message."""
        content = json.loads(self.body)
        error: dict[str, Any] = content.get("error", content)
        assert error["message"], "an error says what was wrong"
        return error


@pytest.fixture(scope="module")
def cluster(shared_cluster: LocalCluster) -> Iterator[LocalCluster]:
    """Found whole after all of it: each test sees for itself that the cluster serves on."""
    yield shared_cluster
    shared_cluster.assert_whole()


@pytest.fixture(params=DOORS)
def door(request: pytest.FixtureRequest, cluster: LocalCluster) -> str:
    return cluster.url(request.param)


def _open(url: str) -> socket.socket:
    parts = urlsplit(url)
    return socket.create_connection((parts.hostname or "", parts.port or 0), timeout=ANSWER_S)


def _ask(url: str, request: bytes) -> Reply:
    """Bytes as they are; the reply up to its end, or to the connection's."""
    with _open(url) as sock:
        with contextlib.suppress(ConnectionError):  # it may have heard enough before we have said all
            sock.sendall(request)
        return _reply(sock)


def _reply(sock: socket.socket) -> Reply:
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while not _is_whole(data):
            piece = sock.recv(65536)
            if not piece:
                break
            data += piece
    head, _, body = data.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1."), f"no reply: {data[:200]!r}"
    return Reply(int(head.split()[1]), head.decode("latin-1"), body)


def _is_whole(data: bytes) -> bool:
    head, end, body = data.partition(b"\r\n\r\n")
    length = re.search(rb"(?i)content-length: *(\d+)", head)
    return bool(end and length) and len(body) >= int(length[1] if length else 0)


def _head(method: str, path: str, length: int | None, *lines: str) -> bytes:
    """With our own length, or with none."""
    every = [f"{method} {path} HTTP/1.1", "Host: test", *lines]
    every += [f"Content-Length: {length}"] if length is not None else []
    return "\r\n".join(every).encode() + b"\r\n\r\n"


def _post(url: str, path: str, body: bytes) -> Reply:
    return _ask(url, _head("POST", path, len(body), "Content-Type: application/json") + body)


def _json(**fields: Any) -> bytes:
    return json.dumps({"model": "smollm2"} | fields).encode()


def _assert_serves(url: str) -> None:
    reply = _post(url, TEXT, _json(prompt="Hello", max_tokens=1))
    assert (reply.status, json.loads(reply.body)["usage"]["completion_tokens"]) == (200, 1)


MALFORMED = [
    b"",
    b"{",
    b"null",
    b"[]",
    b'"text"',
    b"\x00\xff" * 50,
    b'{"model":"smollm2","prompt":"a\xff\xfeb"}',
    b'{"model":"smollm2","prompt":"\\ud800"}',
    b'{"model":"smollm2","prompt":"x","temperature":NaN}',
    b'{"model":"smollm2","prompt":"x","temperature":1e999}',
    b'{"model":"smollm2","prompt":"x","user":' + b"[" * 100_000,
    b'{"model":"smollm2","prompt":"x","new":' + b'{"a":' * 50_000 + b"1" + b"}" * 50_000 + b"}",
    b'{"model":"smollm2","prompt":"x","seed":' + b"9" * 100_000 + b"}",
]
WRONG = [
    {"prompt": 5},
    {"prompt": None},
    {"prompt": {"text": "x"}},
    {"prompt": ""},
    {"prompt": []},
    {"prompt": [[]]},
    {"prompt": [-1]},
    {"prompt": [10**9]},
    {"prompt": "x", "max_tokens": -1},
    {"prompt": "x", "max_tokens": 0},
    {"prompt": "x", "max_tokens": 10**9},
    {"prompt": "x", "max_tokens": 10**40},
    {"prompt": "x", "max_tokens": "7"},
    {"prompt": "x", "temperature": -1},
    {"prompt": "x", "n": 0},
    {"prompt": "x", "n": 10**6},
    {"prompt": "x", "stop": 7},
    {"prompt": "x", "stop": ["a"] * 1000},
    {"prompt": "x", "stream": "yes"},
    {"prompt": "x", "logit_bias": {str(token): 1000 for token in range(10)}},
    {"prompt": "x", "logit_bias": {str(10**9): 1}},
    {"prompt": "x", "logprobs": 10**6},
    {"prompt": "x", "migration_request": {"protocol": 1}},
    {"prompt": [7] * 9000},
    {"prompt": "word " * 9000},
    {"prompt": "a" * 2_000_000},
]


def test_malformed_bodies_are_400(door: str) -> None:
    for path in (TEXT, CHAT):
        for body in MALFORMED:
            reply = _post(door, path, body)
            assert (reply.status, reply.error()["type"]) == (400, "invalid_request_error"), (body[:60], reply)
    _assert_serves(door)


@pytest.mark.parametrize("fields", WRONG, ids=lambda fields: str(fields)[:50])
def test_wrong_values_are_400_in_openais_shape(fields: dict[str, Any], door: str) -> None:
    reply = _post(door, TEXT, _json(**fields))
    assert reply.status == 400, reply
    error = reply.error()
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert len(error["message"]) < 1000


@pytest.mark.parametrize("messages", [[], [{}], [{"role": "user", "content": 5}], [{"content": "x"}], 7, None])
def test_wrong_messages_are_400(messages: Any, door: str) -> None:
    reply = _post(door, CHAT, _json(messages=messages))
    assert (reply.status, reply.error()["type"]) == (400, "invalid_request_error")


def test_a_whole_vocabulary_of_logit_bias_is_served(door: str) -> None:
    bias = {str(token): (100 if token == 5 else -100) for token in range(49152)}
    reply = _post(door, TEXT, _json(prompt="x", max_tokens=2, ignore_eos=True, return_token_ids=True, logit_bias=bias))
    assert json.loads(reply.body)["choices"][0]["token_ids"] == [5, 5]


def test_an_unknown_model_is_404(door: str) -> None:
    for model in ("gpt-4", "", "x" * 100_000, "smollm2\n", "../smollm2"):
        reply = _post(door, TEXT, json.dumps({"model": model, "prompt": "x"}).encode())
        assert (reply.status, reply.error()["code"]) == (404, "model_not_found"), model[:20]
    assert _ask(door, _head("GET", "/v1/models/gpt-4", None)).status == 404


def test_a_body_too_large_is_413_before_it_is_read(door: str) -> None:
    with _open(door) as sock:
        sock.sendall(_head("POST", TEXT, 1 << 40, "Content-Type: application/json") + b"{")
        reply = _reply(sock)
        assert (reply.status, reply.error()["type"]) == (413, "invalid_request_error")
    _assert_serves(door)


def test_chunks_without_end_are_413_too(door: str) -> None:
    chunk = b"100000\r\n" + b"x" * (1 << 20) + b"\r\n"
    with _open(door) as sock:
        sock.sendall(_head("POST", TEXT, None, "Transfer-Encoding: chunked"))
        with contextlib.suppress(ConnectionError):
            for _ in range(40):  # more than any socket buffers: the server must have had enough
                sock.sendall(chunk)
        assert _reply(sock).status == 413
    _assert_serves(door)


def test_a_chunked_body_is_a_body(door: str) -> None:
    body = _json(prompt="Hello", max_tokens=1)
    chunks = b"".join(b"%x\r\n%b\r\n" % (1, body[i : i + 1]) for i in range(len(body)))
    reply = _ask(door, _head("POST", TEXT, None, "Transfer-Encoding: chunked") + chunks + b"0\r\n\r\n")
    assert reply.status == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", TEXT, 405),
        ("DELETE", CHAT, 405),
        ("POST", "/v1/models", 405),
        ("POST", "/health", 405),
        ("GET", "/", None),
        ("GET", "/v1", 404),
        ("GET", "/v1/../../etc/passwd", 404),
        ("POST", "/v1/completion", 404),
        ("GET", "/%00", 404),
        ("PATCH", "/coffee", 404),
    ],
)
def test_wrong_routes_and_methods_are_404_and_405(method: str, path: str, status: int | None, door: str) -> None:
    reply = _ask(door, _head(method, path, 0 if method != "GET" else None))
    if status is None:
        assert reply.status in (200, 404)
    else:
        assert reply.status == status
        assert reply.error()["type"] in ("invalid_request_error", "not_found_error")


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"\r\n\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(300),  # TLS
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 100_000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 100_000 + b"\r\n",
    ],
    ids=["blank", "tls", "no path", "version", "negative", "two lengths", "no chunk", "long header", "many headers"],
)
def test_broken_http_is_refused(request_bytes: bytes, door: str) -> None:
    with _open(door) as sock, contextlib.suppress(ConnectionError):
        sock.sendall(request_bytes)
        with contextlib.suppress(OSError):  # not connected any more
            sock.shutdown(socket.SHUT_WR)
        said = sock.recv(65536)
        assert not said or said.split()[1] in (b"400", b"413", b"431", b"505", b"200"), said[:100]
    _assert_serves(door)


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/nodes/add", b"{"),
        ("POST", "/nodes/add", b'{"url": 5}'),
        ("POST", "/nodes/add", b'{"url": "no url"}'),
        ("POST", "/nodes/add", b'{"url": "http://x:99999999"}'),
        ("POST", "/nodes/add", b'{"url": "http://127.0.0.1:1", "status": {"role": 9}}'),
        ("POST", "/nodes/remove", b"[]"),
        ("POST", "/nodes/remove", b'{"url": "http://127.0.0.1:1"}'),
        ("POST", "/nodes/terminate", b'{"url": ""}'),
        ("GET", "/nodes/add", b""),
        ("POST", "/nodes/nothing", b"{}"),
        ("POST", "/distserve/nothing", b"{}"),
    ],
)
def test_wrong_calls_of_the_proxys_cluster_routes_are_flat_errors(
    method: str, path: str, body: bytes, cluster: LocalCluster
) -> None:
    _assert_flat(_ask(cluster.url(), _head(method, path, len(body)) + body))
    _assert_serves(cluster.url())


@pytest.mark.parametrize("path", ["p2p_initialize", "p2p_connect", "p2p_drop_connect", "free_cache"])
@pytest.mark.parametrize("body", [b"", b"{}", b"[]", b"null", b'{"remote_engine_id": 5}', b'{"a":' * 20_000])
def test_wrong_calls_of_an_engines_cluster_routes_are_flat_errors(
    path: str, body: bytes, cluster: LocalCluster
) -> None:
    for name in ("prefill-1", "decode-1"):
        _assert_flat(_post(cluster.url(name), f"/distserve/{path}", body))


def _assert_flat(reply: Reply) -> None:
    assert 400 <= reply.status < 500, reply
    error = reply.error()
    assert set(error) == {"message", "type", "code", "param", "object"}
    assert (error["code"], error["object"]) == (reply.status, "error")
