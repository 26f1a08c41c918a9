"""The proxy dies or is not there yet: engines stay whole, and are known again as soon as there is a proxy."""

from __future__ import annotations

import pytest

from tests.cluster.asked import outcomes
from tests.cluster.local_cluster import LocalCluster
from tests.faults import phases
from tests.faults.expectations import Expectations

pytestmark = pytest.mark.cluster


def test_engines_outlive_their_proxy_and_register_with_the_next(
    cluster: LocalCluster, expectations: Expectations
) -> None:
    expected = expectations.of()
    with phases.decoding(cluster, expected, True) as stream, phases.decoding(cluster, expected, False) as whole:
        cluster.kill("proxy")
        for cut in outcomes([stream, whole]):
            assert not cut.done, "no answer may look complete"
            assert cut.finish_reason is None
    cluster.assert_whole()
    cluster.revive()
    expectations.assert_shared(cluster)


def test_an_engine_that_finds_no_proxy_says_so_and_joins_later(
    cluster: LocalCluster, expectations: Expectations
) -> None:
    cluster.kill("proxy")
    cluster.kill("decode-1")
    cluster.start("decode-1")
    said = f"the proxy {cluster.url()} cannot be reached"

    def complains() -> bool:
        last_start = cluster.logs()["decode-1"].rpartition("starting the core")[2]
        return said in last_start

    cluster.eventually(complains, "the engine says that it retries", 60.0)
    cluster.revive()
    expectations.assert_shared(cluster)
