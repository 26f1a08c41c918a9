"""One cluster for all faults, without a prefix cache: every request moves its whole prompt. And what is right."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster.conftest import pytest_runtest_makereport
from tests.cluster.local_cluster import LocalCluster
from tests.cluster.reference import Reference
from tests.faults.expectations import Expectations

__all__ = ["pytest_runtest_makereport"]  # the logs of the cluster beside each failure

ENGINE_FLAGS = ("--no-prefix-cache", "--handoff-timeout", "5", "--lease-seconds", "4", "--request-timeout", "60")
PREFILL_FLAGS = ("--max-num-batched-tokens", "16")  # a long prompt is announced in many pieces
PROXY_FLAGS = ("--idle-timeout", "5", "--request-timeout", "60")


@pytest.fixture(scope="session")
def faulty_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    with LocalCluster(
        tmp_path_factory.mktemp("faults"),
        engine_flags=ENGINE_FLAGS,
        prefill_flags=PREFILL_FLAGS,
        proxy_flags=PROXY_FLAGS,
    ) as cluster:
        yield cluster


@pytest.fixture
def cluster(faulty_cluster: LocalCluster, expectations: Expectations) -> Iterator[LocalCluster]:
    """Whole before each test. After it every block is back, and a new request goes through both engines."""
    if faulty_cluster.has_losses():
        faulty_cluster.revive()
    yield faulty_cluster
    if faulty_cluster.has_losses():
        faulty_cluster.assert_whole()
    else:
        expectations.assert_shared(faulty_cluster)


@pytest.fixture(scope="session")
def expectations() -> Expectations:
    return Expectations(Reference())
