"""A cluster with keys: user keys open /v1, the cluster key opens everything, and engines prove it to each other."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from deploy.cluster import Keys
from tests.cluster.local_cluster import LocalCluster

pytestmark = pytest.mark.cluster

USER, CLUSTER = "user-key", "cluster-key"
BODY = {"model": "smollm2", "prompt": "Hello", "max_tokens": 2}
WRONG_KEYS = [None, "", "wrong", USER + "x", CLUSTER[:-1], "\u00e9", "x" * 5000]


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    with LocalCluster(tmp_path_factory.mktemp("keyed"), keys=Keys((USER, "second"), CLUSTER)) as cluster:
        yield cluster
        cluster.assert_whole()


@pytest.mark.parametrize("key", [USER, "second", CLUSTER])
def test_good_keys_are_answered_and_kv_moves_between_engines_that_hold_the_cluster_key(
    key: str, keyed: LocalCluster
) -> None:
    before = keyed.engine_metric("decode-1", "transferred_tokens_total")
    assert _ask(keyed.url(), "/v1/completions", key, BODY)[0] == 200
    keyed.eventually(lambda: keyed.engine_metric("decode-1", "transferred_tokens_total") > before, "KV has moved")


@pytest.mark.parametrize("key", WRONG_KEYS, ids=str)
@pytest.mark.parametrize("name", ["proxy", "prefill-1", "decode-1"])
def test_wrong_keys_are_401(name: str, key: str | None, keyed: LocalCluster) -> None:
    url = keyed.url(name)
    for path in ("/v1/completions", "/v1/chat/completions"):
        status, reply = _ask(url, path, key, BODY)
        assert (status, reply["error"]["type"]) == (401, "authentication_error")
    status, reply = _ask(url, "/v1/models", key)
    assert (status, reply["error"]["code"]) == (401, "invalid_api_key")


@pytest.mark.parametrize("key", [*WRONG_KEYS, USER], ids=str)
def test_cluster_routes_need_the_cluster_key(key: str | None, keyed: LocalCluster) -> None:
    calls = [
        (keyed.url(), "/nodes/add", {"url": "http://127.0.0.1:1", "status": {"role": 2, "models": ["smollm2"]}}),
        (keyed.url(), "/nodes/remove", {"url": keyed.url("prefill-1")}),
        (keyed.url(), "/nodes/status", None),
        (keyed.url(), "/distserve/connection_warmup", {}),
        (keyed.url("decode-1"), "/distserve/engine_info", None),
        (keyed.url("prefill-1"), "/distserve/p2p_initialize", {}),
        (keyed.url("prefill-1"), "/distserve/free_cache", {"remote_engine_id": "x", "remote_session_id": 1}),
    ]
    for url, path, body in calls:
        status, reply = _ask(url, path, key, body)
        assert (status, reply["code"], reply["type"]) == (401, 401, "authentication_error"), path
    assert len(_ask(keyed.url(), "/nodes/status", CLUSTER)[1]) == 2, "nothing was changed"


def test_users_cannot_ask_engines_for_handoffs(keyed: LocalCluster) -> None:
    header = {"X-Tandem-Handoff": json.dumps({"type": "give", "session": 5, "peer": keyed.url("decode-1")})}
    assert _ask(keyed.url("prefill-1"), "/v1/completions", USER, BODY, header)[0] == 403
    assert _ask(keyed.url("prefill-1"), "/v1/completions", USER, BODY | {"preserve_cache": True})[0] == 403
    # The proxy passes no such header on: the request is an ordinary one.
    assert _ask(keyed.url(), "/v1/completions", USER, BODY, header)[0] == 200


def test_what_watches_the_cluster_needs_no_key(keyed: LocalCluster) -> None:
    for name in ("proxy", "prefill-1", "decode-1"):
        with urllib.request.urlopen(f"{keyed.url(name)}/health", timeout=10) as reply:
            assert reply.status == 200


def _ask(
    url: str, path: str, key: str | None, body: Any = None, headers: dict[str, str] | None = None
) -> tuple[int, dict[str, Any]]:
    every = {"Content-Type": "application/json"} | (headers or {})
    every |= {} if key is None else {"Authorization": f"Bearer {key}"}
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url + path, data, every), timeout=60) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)
