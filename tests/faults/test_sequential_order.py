"""LMDeploy's order, prefill whole and then decode: the same faults, the same answers."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from tests.cluster.asked import Asked
from tests.cluster.local_cluster import LocalCluster
from tests.cluster.second_proxy import SecondProxy
from tests.faults import phases
from tests.faults.expectations import COUNT, LONG, Expectations, assert_answered
from tests.faults.phases import thawed

pytestmark = pytest.mark.cluster


@pytest.fixture
def proxy(cluster: LocalCluster) -> Iterator[SecondProxy]:
    with SecondProxy(cluster, "--handoff", "sequential") as proxy:
        yield proxy


def test_a_prefill_that_dies_while_it_computes_costs_no_token(
    proxy: SecondProxy, cluster: LocalCluster, expectations: Expectations
) -> None:
    expected = expectations.of(LONG)
    with Asked(proxy.url, expected.prompt, max_tokens=COUNT) as asked:
        cluster.eventually(lambda: cluster.engine_metric("prefill-1", "requests_running") > 0, "prefill computes")
        cluster.kill("prefill-1")
        assert_answered(asked.outcome(), expected)


def test_a_prefill_that_dies_with_the_kv_in_its_hands_costs_no_token(
    proxy: SecondProxy, cluster: LocalCluster, expectations: Expectations
) -> None:
    expected = expectations.of()
    with thawed(cluster, "decode-1"):
        cluster.freeze("decode-1")
        with Asked(proxy.url, expected.prompt, max_tokens=COUNT) as asked:
            cluster.eventually(lambda: _holds(cluster), "prefill holds the KV of a prompt")
            cluster.kill("prefill-1")
            cluster.thaw("decode-1")
            assert_answered(asked.outcome(), expected)


@pytest.mark.parametrize("frozen", ["prefill-1", "decode-1"])
def test_a_client_that_leaves_frees_everything(
    frozen: str, proxy: SecondProxy, cluster: LocalCluster, expectations: Expectations
) -> None:
    with thawed(cluster, frozen):
        cluster.freeze(frozen)
        with Asked(proxy.url, expectations.of().prompt, max_tokens=phases.ENDLESS):
            if frozen == "decode-1":
                cluster.eventually(lambda: _holds(cluster), "prefill holds the KV of a prompt")
    began = time.monotonic()
    cluster.assert_whole()
    assert time.monotonic() - began < 3.5, "freed because it was told so, not because the lease ran out"


def _holds(cluster: LocalCluster) -> bool:
    metrics = cluster.metrics("prefill-1")
    return metrics["tandem_engine_requests_in_handoff"] > 0 and metrics["tandem_engine_requests_running"] == 0
