"""The cluster that every other test here stands on: it answers, disaggregates, and sees what is left."""

from __future__ import annotations

from pathlib import Path

import pytest

from kernels import cpu
from tests.cluster.local_cluster import LocalCluster

pytestmark = pytest.mark.cluster


def test_a_completion_goes_through_both_engines_and_leaves_no_block(cluster: LocalCluster) -> None:
    before = cluster.engine_metric("decode-1", "transferred_tokens_total")
    answer = cluster.client().completions.create(
        model=cluster.model, prompt="The capital of France is", max_tokens=8, temperature=0
    )
    assert "Paris" in answer.choices[0].text
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 8
    cluster.eventually(
        lambda: cluster.engine_metric("decode-1", "transferred_tokens_total") > before,
        "the prompt's KV was transferred",
    )


def test_no_process_of_a_cluster_on_native_kernels_has_loaded_torch(cluster: LocalCluster) -> None:
    if not cpu.NATIVE:
        pytest.skip(cpu.REASON)
    answer = cluster.client().completions.create(model=cluster.model, prompt="Hello", max_tokens=4, temperature=0.7)
    assert answer.choices[0].text
    loaded = {pid: Path(f"/proc/{pid}/maps").read_text() for pid in cluster.processes()}
    assert len(loaded) >= 5  # a proxy, and two engines of two processes
    assert not [pid for pid, files in loaded.items() if "libtorch" in files]
