"""What decode computes itself: prompts of which so little is new to it that a hand-off would cost more, and those that
prefill is too far behind for."""

from __future__ import annotations

import pytest

from tests.cluster.answers import complete
from tests.cluster.asked import DEADLINE_S, Asked, outcomes
from tests.cluster.conftest import StartCluster
from tests.cluster.local_cluster import LocalCluster
from tests.cluster.prompts import fresh_prompt

pytestmark = pytest.mark.cluster

SHORT, LONG = 64, 65
BLOCK = 16  # tokens


def test_decode_computes_short_prompts_and_takes_long_ones(start_cluster: StartCluster, cluster: LocalCluster) -> None:
    pair = start_cluster(decode_flags=("--local-prefill-tokens", str(SHORT)))
    local, moved = _figures(pair)
    short, long = fresh_prompt(SHORT), fresh_prompt(LONG)
    for prompt in (short, long):
        answer = complete(pair.client(), prompt, max_tokens=12, ignore_eos=True)
        assert answer.token_ids == complete(cluster.client(), prompt, max_tokens=12, ignore_eos=True).token_ids
    _expect(pair, local + SHORT, moved + LONG)
    turn = [*long, *answer.token_ids, *fresh_prompt(20)]
    complete(pair.client(), turn, max_tokens=4, ignore_eos=True)
    reused = (LONG + 12 - 1) // BLOCK * BLOCK  # the last token of the answer was never computed
    _expect(pair, local + SHORT + len(turn) - reused, moved + LONG)
    assert pair.engine_metric("decode-1", "recomputed_tokens_total") == 0
    pair.assert_whole()


def test_decode_reads_what_prefill_is_too_far_behind_for(start_cluster: StartCluster, cluster: LocalCluster) -> None:
    pair = start_cluster(decode_flags=("--local-prefill-tokens", str(SHORT)))
    complete(pair.client(), fresh_prompt(200), max_tokens=4)  # and decode knows how long a prompt takes there
    local, _ = _figures(pair)
    prompts = [fresh_prompt(200) for _ in range(4)]
    pair.freeze("prefill-1")
    try:
        asked = [Asked(pair.url(), prompt, max_tokens=8) for prompt in prompts]
        pair.eventually(lambda: _figures(pair)[0] > local, "decode takes a prompt back")
    finally:
        pair.thaw("prefill-1")
    for prompt, outcome in zip(prompts, outcomes(asked, DEADLINE_S), strict=True):
        assert (outcome.status, outcome.error) == (200, None)
        assert outcome.token_ids == complete(cluster.client(), prompt, max_tokens=8, ignore_eos=True).token_ids
    pair.assert_whole()


def _expect(pair: LocalCluster, local: float, moved: float) -> None:
    pair.eventually(lambda: _figures(pair) == (local, moved), f"decode computed {local} tokens and pulled {moved}")


def _figures(pair: LocalCluster) -> tuple[float, float]:
    return pair.engine_metric("decode-1", "local_tokens_total"), pair.engine_metric(
        "decode-1", "transferred_tokens_total"
    )
