"""The endpoint that fails on purpose does exactly what its rules say."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from kvtransfer.faults import Fault, FaultyEndpoint, Rule
from kvtransfer.transfer import Connection, ConnectionLost, Pulled, PullFailed
from tests.unit.transfer_peer import Peer, Reader, pattern

SECRET = b"s" * 32
POOL_BYTES = 1 << 20
COPIES = np.array([[0, 10, 5000], [9000, 8000, 5000]], np.int64)

Make = Callable[..., tuple[Reader, Connection]]


@pytest.fixture
def connected() -> Iterator[Make]:
    """Makes a reader whose endpoint follows the rules, connected to a peer."""
    peer, readers = Peer("shm", POOL_BYTES, SECRET), []

    def make(*rules: Rule) -> tuple[Reader, Connection]:
        reader = Reader("shm", POOL_BYTES)
        readers.append(reader)
        reader.endpoint = FaultyEndpoint(reader.endpoint, reader.region, rules)
        return reader, reader.connect(peer.offer, SECRET)

    yield make
    for reader in readers:
        reader.close()
    peer.kill()


def is_true(reader: Reader) -> bool:
    theirs = pattern(POOL_BYTES)
    return all((reader.pool[to : to + n] == theirs[from_ : from_ + n]).all() for from_, to, n in COPIES.tolist())


def test_only_the_named_pull_is_struck(connected: Make) -> None:
    reader, connection = connected(Rule(fault=Fault.CORRUPT, first=1))
    for transfer_id, true in enumerate([True, False, True]):
        connection.pull(transfer_id, COPIES, 10)
        assert reader.wait(Pulled).transfer_id == transfer_id
        assert is_true(reader) is true


def test_a_dropped_pull_fails_at_its_deadline_and_brings_nothing(connected: Make) -> None:
    reader, connection = connected(Rule(fault=Fault.DROP))
    connection.pull(1, COPIES, 0.2)
    assert reader.wait(PullFailed).transfer_id == 1
    assert not reader.pool.any()


def test_a_delayed_pull_comes_late(connected: Make) -> None:
    reader, connection = connected(Rule(fault=Fault.DELAY, delay_s=0.3))
    started = time.monotonic()
    connection.pull(1, COPIES, 10)
    connection.pull(2, COPIES, 10)
    assert [reader.wait(Pulled).transfer_id for _ in range(2)] == [2, 1]
    assert time.monotonic() - started >= 0.3


def test_a_cut_connection_is_lost_after_its_pulls(connected: Make) -> None:
    reader, connection = connected(Rule(fault=Fault.CUT, first=1))
    big = np.array([[0, 0, POOL_BYTES]] * 2000, np.int64)
    connection.pull(1, big, 10)
    connection.pull(2, big, 10)
    assert [reader.wait(PullFailed).transfer_id for _ in range(2)] == [1, 2]
    assert reader.wait(ConnectionLost).connection is connection
