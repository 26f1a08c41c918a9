"""SIGSTOP of an engine: nobody waits for ever, it is out within seconds, and nothing is harmed when it goes on."""

from __future__ import annotations

import json
import time

import pytest

from deploy import probe
from tests.cluster.asked import Asked
from tests.cluster.local_cluster import LocalCluster
from tests.faults import phases
from tests.faults.expectations import COUNT, LONG, Expectations, assert_answered, assert_failed_truly
from tests.faults.phases import thawed

pytestmark = pytest.mark.cluster

OUT_S = 12.0  # two missed probes, and a busy machine
BACK_S = 12.0


def test_a_prompt_whose_prefill_stops_is_read_by_decode(cluster: LocalCluster, expectations: Expectations) -> None:
    expected = expectations.of(LONG)
    with thawed(cluster, "prefill-1"), phases.transferring(cluster, expected, True) as asked:
        cluster.freeze("prefill-1")
        assert_answered(asked.outcome(), expected)
        assert not _is_up(cluster, "prefill-1")
    cluster.eventually(lambda: _is_up(cluster, "prefill-1"), "the proxy lets prefill in again", BACK_S)


def test_a_stream_whose_decode_stops_ends_with_an_error(cluster: LocalCluster, expectations: Expectations) -> None:
    expected, other = expectations.of(), expectations.of(name="another")
    with thawed(cluster, "decode-1"), phases.decoding(cluster, expected, True) as asked:
        cluster.freeze("decode-1")
        assert_failed_truly(asked.outcome(), expected)
        cluster.eventually(lambda: not _is_up(cluster, "decode-1"), "the proxy puts decode out", OUT_S)
        began = time.monotonic()
        assert_answered(Asked(cluster.url(), other.prompt, max_tokens=COUNT).outcome(), other)
        assert time.monotonic() - began < OUT_S, "nobody tries the hung engine again"
    cluster.eventually(lambda: _is_up(cluster, "decode-1"), "the proxy lets decode in again", BACK_S)


def test_a_request_that_a_stopped_decode_never_saw_is_answered_by_another(
    cluster: LocalCluster, expectations: Expectations
) -> None:
    expected = expectations.of()
    with thawed(cluster, "decode-1"), phases.waiting_for_decode(cluster, expected, True) as asked:
        assert_answered(asked.outcome(), expected)


def _is_up(cluster: LocalCluster, name: str) -> bool:
    overview = json.loads(probe.ask(f"{cluster.url()}/nodes/overview"))
    return bool(next(node["up"] for node in overview["nodes"] if node["url"] == cluster.url(name)))
