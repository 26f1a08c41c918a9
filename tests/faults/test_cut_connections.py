"""The connection that carries KV breaks: decode reads the prompt itself, and connects again by itself."""

from __future__ import annotations

import pytest

from tests.cluster.asked import Asked
from tests.cluster.local_cluster import LocalCluster
from tests.faults import phases
from tests.faults.expectations import COUNT, LONG, RECOVERY_S, Expectations, assert_answered
from tests.faults.pairing import relayed

pytestmark = pytest.mark.cluster

BLOCK_BYTES = 30 * 2 * 3 * 16 * 64 * 4


@pytest.mark.parametrize("cut_after_bytes", [1, 16, 17, BLOCK_BYTES, 5 * BLOCK_BYTES + 100])
def test_a_connection_cut_in_a_pull_costs_a_recomputation_and_no_token(
    cut_after_bytes: int, cluster: LocalCluster, expectations: Expectations
) -> None:
    expected = expectations.of(200)
    with relayed(cluster) as relay:
        recomputed = cluster.engine_metric("decode-1", "recomputed_tokens_total")
        relay.cut_after(cut_after_bytes)
        assert_answered(Asked(cluster.url(), expected.prompt, max_tokens=COUNT).outcome(), expected)
        assert cluster.engine_metric("decode-1", "recomputed_tokens_total") == recomputed + 200
        cluster.assert_whole()
        _assert_connects_again(cluster, expectations)


def test_a_connection_cut_while_it_is_idle_is_made_again(cluster: LocalCluster, expectations: Expectations) -> None:
    with relayed(cluster) as relay:
        relay.cut()
        _assert_connects_again(cluster, expectations)
        assert relay.passed_bytes > BLOCK_BYTES


def test_a_connection_dropped_by_the_wire_in_a_pull_costs_no_token(
    cluster: LocalCluster, expectations: Expectations
) -> None:
    expected = expectations.of(LONG)
    with relayed(cluster) as relay, phases.transferring(cluster, expected, False) as asked:
        relay.cut()
        assert_answered(asked.outcome(), expected)
        _assert_connects_again(cluster, expectations)


def _assert_connects_again(cluster: LocalCluster, expectations: Expectations) -> None:
    cluster.eventually(
        lambda: cluster.engine_metric("decode-1", "link_connected") == 1, "decode reads prefill again", RECOVERY_S
    )
    expectations.assert_shared(cluster)
