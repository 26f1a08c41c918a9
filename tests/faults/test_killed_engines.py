"""kill -9 of either engine in each phase of a request: an answer or a true error, whole pools, a link that heals."""

from __future__ import annotations

import pytest

from tests.cluster.asked import Asked
from tests.cluster.local_cluster import LocalCluster
from tests.faults import phases
from tests.faults.expectations import COUNT, Expectations, assert_answered, assert_failed_truly
from tests.faults.phases import Reach

pytestmark = pytest.mark.cluster


@pytest.mark.parametrize("reach", [phases.waiting_for_prefill, phases.computing, phases.transferring])
def test_decode_reads_the_prompt_itself_when_prefill_dies(
    reach: Reach, cluster: LocalCluster, expectations: Expectations
) -> None:
    expected = expectations.of(phases.LENGTHS[reach])
    recomputed = cluster.engine_metric("decode-1", "recomputed_tokens_total")
    with reach(cluster, expected, True) as asked:
        cluster.kill("prefill-1")
        assert_answered(asked.outcome(), expected)
    assert cluster.engine_metric("decode-1", "recomputed_tokens_total") == recomputed + len(expected.prompt)
    _assert_recovers(cluster, expectations)


def test_a_stream_that_has_begun_does_not_notice_that_prefill_dies(
    cluster: LocalCluster, expectations: Expectations
) -> None:
    expected = expectations.of()
    with phases.decoding(cluster, expected, True) as asked:
        cluster.kill("prefill-1")
        assert_answered(asked.outcome(), expected)
    # Nobody is left to read prompts but decode itself.
    alone = expectations.of(name="another")
    assert_answered(Asked(cluster.url(), alone.prompt, max_tokens=COUNT).outcome(), alone)
    _assert_recovers(cluster, expectations)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("reach", [phases.waiting_for_decode, phases.transferring])
def test_another_engine_answers_when_decode_dies_before_its_first_word(
    reach: Reach, stream: bool, cluster: LocalCluster, expectations: Expectations
) -> None:
    expected = expectations.of(phases.LENGTHS[reach])
    with reach(cluster, expected, stream) as asked:
        cluster.kill("decode-1")
        assert_answered(asked.outcome(), expected)
    _assert_recovers(cluster, expectations)


def test_a_whole_answer_is_made_elsewhere_when_decode_dies(cluster: LocalCluster, expectations: Expectations) -> None:
    expected = expectations.of()
    with phases.decoding(cluster, expected, False) as asked:
        cluster.kill("decode-1")
        assert_answered(asked.outcome(), expected)
    _assert_recovers(cluster, expectations)


def test_a_stream_that_is_cut_says_so(cluster: LocalCluster, expectations: Expectations) -> None:
    expected = expectations.of()
    with phases.decoding(cluster, expected, True) as asked:
        cluster.kill("decode-1")
        assert_failed_truly(asked.outcome(), expected)
    _assert_recovers(cluster, expectations)


def _assert_recovers(cluster: LocalCluster, expectations: Expectations) -> None:
    """The survivors are whole; the killed one comes back as another incarnation and is linked by itself."""
    cluster.assert_whole()
    cluster.revive()
    expectations.assert_shared(cluster)
