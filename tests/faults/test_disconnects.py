"""A client that goes away, in any phase: both engines stop, and free everything."""

from __future__ import annotations

import pytest

from tests.cluster.local_cluster import LocalCluster
from tests.faults import phases
from tests.faults.expectations import Expectations
from tests.faults.phases import Reach, thawed

pytestmark = pytest.mark.cluster

PHASES = [
    phases.waiting_for_prefill,
    phases.waiting_for_decode,
    phases.computing,
    phases.transferring,
    phases.decoding,
]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("reach", PHASES)
def test_a_client_that_leaves_frees_everything(
    reach: Reach, stream: bool, cluster: LocalCluster, expectations: Expectations
) -> None:
    expected = expectations.of(phases.LENGTHS[reach])
    before = _output_tokens(cluster)
    with thawed(cluster, "prefill-1", "decode-1"):
        reach(cluster, expected, stream).hang_up()
    cluster.assert_whole()
    assert _output_tokens(cluster) < before + phases.ENDLESS, "the engines went on for nobody"


def _output_tokens(cluster: LocalCluster) -> float:
    return cluster.engine_metric("decode-1", "output_tokens_total")
