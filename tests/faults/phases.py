"""Where a request is when something happens to it, made certain before the test goes on.

The prefill engine reads a long prompt in many steps, so each phase lasts long enough to show in the engines' figures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tests.cluster.asked import Asked
from tests.cluster.local_cluster import LocalCluster
from tests.faults.expectations import COUNT, LONG, SHORT, Expected

ENDLESS = 200  # tokens of an answer that goes on while a test looks at it

Reach = Callable[[LocalCluster, Expected, bool], Asked]


def waiting_for_prefill(cluster: LocalCluster, expected: Expected, stream: bool) -> Asked:
    """Decode has reserved its blocks; prefill, frozen, has not begun. The caller thaws or kills it."""
    cluster.freeze("prefill-1")
    asked = Asked(cluster.url(), expected.prompt, stream=stream, max_tokens=COUNT)
    cluster.eventually(lambda: _handing_over(cluster, "decode-1"), "decode waits for prefill")
    return asked


def waiting_for_decode(cluster: LocalCluster, expected: Expected, stream: bool) -> Asked:
    """Prefill expects decode, which is frozen. The caller thaws or kills it."""
    cluster.freeze("decode-1")
    asked = Asked(cluster.url(), expected.prompt, stream=stream, max_tokens=COUNT)
    cluster.eventually(lambda: _handing_over(cluster, "prefill-1"), "prefill waits for decode")
    return asked


def computing(cluster: LocalCluster, expected: Expected, stream: bool) -> Asked:
    """Prefill is at its first chunk, and nothing has moved."""
    asked = Asked(cluster.url(), expected.prompt, stream=stream, max_tokens=COUNT)
    cluster.eventually(lambda: _handing_over(cluster, "decode-1"), "decode waits for prefill")
    return asked


def transferring(cluster: LocalCluster, expected: Expected, stream: bool) -> Asked:
    """Decode has pulled some blocks of a prompt that is still being read."""
    before = cluster.engine_metric("decode-1", "transferred_bytes_total")
    asked = Asked(cluster.url(), expected.prompt, stream=stream, max_tokens=COUNT)
    cluster.eventually(
        lambda: cluster.engine_metric("decode-1", "transferred_bytes_total") > before, "blocks are pulled", 30.0
    )
    assert _handing_over(cluster, "decode-1"), "the hand-off is over already"
    return asked


def decoding(cluster: LocalCluster, expected: Expected, stream: bool) -> Asked:
    """Tokens come, and will for a while."""
    before = cluster.engine_metric("decode-1", "output_tokens_total")
    asked = Asked(cluster.url(), expected.prompt, stream=stream, max_tokens=ENDLESS)
    if stream:
        asked.wait_for_tokens(3)
    else:
        cluster.eventually(lambda: cluster.engine_metric("decode-1", "output_tokens_total") > before + 2, "tokens come")
    return asked


LENGTHS: dict[Reach, int] = {
    waiting_for_prefill: SHORT,
    waiting_for_decode: SHORT,
    computing: LONG,
    transferring: LONG,
    decoding: SHORT,
}


@contextmanager
def thawed(cluster: LocalCluster, *names: str) -> Iterator[None]:
    """Nothing stays frozen, however the test ends."""
    try:
        yield
    finally:
        for name in names:
            cluster.thaw(name)


def _handing_over(cluster: LocalCluster, name: str) -> bool:
    return cluster.engine_metric(name, "requests_in_handoff") > 0
