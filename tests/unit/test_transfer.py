"""What every transport promises, checked between two processes."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest

from kvtransfer.copies import Copies, cut
from kvtransfer.layout import KVLayout
from kvtransfer.memory import Region
from kvtransfer.plan import plan
from kvtransfer.transfer import (
    TRANSPORTS,
    Connected,
    Connection,
    ConnectionLost,
    Pulled,
    PullFailed,
    ReaderLost,
    open_endpoint,
)
from tests.unit.transfer_peer import HOST, ROOT, Peer, Reader, pattern

SECRET = b"s" * 32
LAYOUT = KVLayout(num_blocks=60, block_size=16, num_layers=30, num_kv_heads=3, head_dim=64, dtype="bfloat16")
POOL_BYTES = LAYOUT.pool_bytes
TWICE = np.array([[0, 0, POOL_BYTES]] * 200, np.int64)  # a pull that takes a while

MEMORY = Path("/proc/meminfo").read_text()


@pytest.fixture(params=TRANSPORTS)
def transport(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def peer(transport: str) -> Iterator[Peer]:
    peer = Peer(transport, POOL_BYTES, SECRET)
    yield peer
    peer.kill()


@pytest.fixture
def reader(transport: str) -> Iterator[Reader]:
    reader = Reader(transport, POOL_BYTES)
    yield reader
    reader.close()


def ranges(*rows: tuple[int, int, int]) -> Copies:
    return np.array(rows, np.int64).reshape(-1, 3)


def holds(reader: Reader, copies: Copies) -> bool:
    theirs = pattern(POOL_BYTES)
    return all((reader.pool[to : to + n] == theirs[from_ : from_ + n]).all() for from_, to, n in copies.tolist())


def test_blocks_of_another_process_arrive_whole_and_nothing_else_changes(peer: Peer, reader: Reader) -> None:
    connection = reader.connect(peer.offer, SECRET)
    copies = plan(LAYOUT, LAYOUT, [5, 9, 40], [1, 8, 20], 0, 40)
    connection.pull(7, copies, 10)
    pulled = reader.wait(Pulled)
    assert (pulled.transfer_id, pulled.num_bytes) == (7, 3 * LAYOUT.block_bytes)
    assert holds(reader, copies)
    untouched = np.ones(POOL_BYTES, bool)
    for _, to, length in copies.tolist():
        untouched[to : to + length] = False
    assert not reader.pool[untouched].any()


def test_thousands_of_short_ranges_arrive(peer: Peer, reader: Reader) -> None:
    """Other block sizes on both sides: runs of a few hundred bytes, over many requests."""
    other = msgspec.structs.replace(LAYOUT, block_size=24, num_blocks=40)
    copies = plan(LAYOUT, other, range(60), range(40), 3, 900)
    connection = reader.connect(peer.offer, SECRET)
    connection.pull(1, copies, 10)
    assert reader.wait(Pulled).num_bytes == copies[:, 2].sum()
    assert holds(reader, copies)


@pytest.mark.skipif("HugePages_Free:        0" in MEMORY, reason="no huge pages are reserved (vm.nr_hugepages)")
def test_a_pool_in_huge_pages_is_read_the_same(transport: str) -> None:
    owner, reader = Reader(transport, 3_000_000), Reader(transport, 3_000_000)
    assert owner.region.huge
    owner.pool[:] = pattern(3_000_000)
    owner.endpoint.admit("reader", SECRET)
    copies = ranges((0, 0, 1_000_000), (2_000_000, 1_500_000, 1_000_000))
    reader.connect(owner.endpoint.offer(), SECRET).pull(1, copies, 10)
    reader.wait(Pulled)
    assert (reader.pool[1_500_000:2_500_000] == owner.pool[2_000_000:]).all()
    reader.close()
    owner.close()


def test_the_probe_measures_the_connection(peer: Peer, reader: Reader) -> None:
    connection = reader.start(peer.offer, SECRET)
    connected = reader.wait(Connected)
    assert connected.connection is connection
    assert connected.gigabytes_per_s > 0.01
    assert not reader.pool.any()


def test_pulls_end_in_the_order_they_were_made(peer: Peer, reader: Reader) -> None:
    connection = reader.connect(peer.offer, SECRET)
    for transfer_id in range(50):
        connection.pull(transfer_id, ranges((transfer_id * 1000, transfer_id * 1000, 1000)), 10)
    assert [reader.wait(Pulled).transfer_id for _ in range(50)] == list(range(50))
    assert holds(reader, ranges((0, 0, 50_000)))


def test_a_pull_of_nothing_succeeds(peer: Peer, reader: Reader) -> None:
    connection = reader.connect(peer.offer, SECRET)
    connection.pull(1, ranges(), 10)
    connection.pull(2, ranges((0, 0, 0), (5, 5, 1)), 10)
    assert [reader.wait(Pulled).num_bytes for _ in range(2)] == [0, 1]


@pytest.mark.parametrize(
    "bad",
    [
        (POOL_BYTES, 0, 1),
        (0, POOL_BYTES, 1),
        (0, 0, POOL_BYTES + 1),
        (-1, 0, 1),
        (0, -1, 1),
        (0, 0, -1),
        (8, 0, 2**63 - 1),
    ],
)
def test_a_range_outside_either_pool_is_refused_at_once(peer: Peer, reader: Reader, bad: tuple[int, int, int]) -> None:
    connection = reader.connect(peer.offer, SECRET)
    with pytest.raises(ValueError, match="outside"):
        connection.pull(1, ranges((0, 0, 1), bad), 10)
    connection.pull(2, ranges((0, 0, 1)), 10)
    assert reader.wait(Pulled).transfer_id == 2


def test_closing_fails_the_pulls_under_way_and_then_no_byte_is_written(peer: Peer, reader: Reader) -> None:
    connection = reader.connect(peer.offer, SECRET)
    connection.pull(1, TWICE, 30)
    connection.pull(2, TWICE, 30)
    connection.close()
    connection.close()
    assert [reader.wait(PullFailed).transfer_id for _ in range(2)] == [1, 2]
    reader.pool[:] = 0
    connection.pull(3, ranges((0, 0, 1)), 30)
    assert reader.wait(PullFailed).transfer_id == 3
    assert not reader.pool.any()


def test_a_pull_past_its_deadline_fails_and_then_no_byte_is_written(peer: Peer, reader: Reader) -> None:
    connection = reader.connect(peer.offer, SECRET)
    connection.pull(1, TWICE, 0.05)
    assert "deadline" in reader.wait(PullFailed).reason
    reader.pool[:] = 0
    connection.pull(2, ranges(), 10)  # answered after everything that was still under way
    reader.next()
    assert not reader.pool.any()


def test_a_killed_owner_is_noticed_at_once(peer: Peer, reader: Reader) -> None:
    connection = reader.connect(peer.offer, SECRET)
    connection.pull(1, TWICE, 30)
    started = time.monotonic()
    peer.kill()
    assert reader.wait(PullFailed).transfer_id == 1
    assert reader.wait(ConnectionLost).connection is connection
    assert time.monotonic() - started < 2
    connection.pull(2, ranges((0, 0, 1)), 30)
    assert reader.wait(PullFailed).transfer_id == 2


def test_a_killed_owner_is_noticed_while_idle(peer: Peer, reader: Reader) -> None:
    connection = reader.connect(peer.offer, SECRET)
    peer.kill()
    assert reader.wait(ConnectionLost, 2).connection is connection


def test_a_stopped_owner_costs_no_more_than_the_deadline(peer: Peer, reader: Reader, transport: str) -> None:
    """Over shared memory a stopped owner is no obstacle at all."""
    connection = reader.connect(peer.offer, SECRET)
    peer.stop()
    connection.pull(1, ranges((0, 0, POOL_BYTES)), 1.0)
    if transport == "shm":
        reader.wait(Pulled)
        assert holds(reader, ranges((0, 0, POOL_BYTES)))
    else:
        started = time.monotonic()
        reader.wait(PullFailed)
        assert 0.5 < time.monotonic() - started < 3
        reader.wait(ConnectionLost)


def test_a_stopped_owner_cannot_hold_up_a_connect(peer: Peer, reader: Reader) -> None:
    peer.stop()
    reader.start(peer.offer, SECRET, deadline_s=0.5)
    assert "within 0.5 s" in reader.wait(ConnectionLost, 3).reason


def test_an_owner_that_restarts_is_another_connection(peer: Peer, reader: Reader, transport: str) -> None:
    reader.connect(peer.offer, SECRET)
    peer.kill()
    reader.wait(ConnectionLost)
    reader.start(peer.offer, SECRET)
    reader.wait(ConnectionLost)
    again = Peer(transport, POOL_BYTES, SECRET)
    try:
        reader.connect(again.offer, SECRET).pull(1, ranges((0, 0, 100)), 10)
        reader.wait(Pulled)
    finally:
        again.kill()


def test_a_connect_closed_before_it_was_connected_is_lost(peer: Peer, reader: Reader) -> None:
    connection = reader.start(peer.offer, SECRET)
    connection.close()
    assert reader.wait(ConnectionLost).connection is connection


def test_the_owner_hears_of_a_killed_reader(transport: str, reader: Reader) -> None:
    reader.endpoint.admit("reader", SECRET)
    program = f"""if True:
        import msgspec, time
        from kvtransfer.offer import TransportOffer
        from tests.unit.transfer_peer import Reader
        offer = msgspec.json.decode({msgspec.json.encode(reader.endpoint.offer())!r}, type=TransportOffer)
        Reader({transport!r}, 4096).connect(offer, {SECRET!r})
        print("connected", flush=True)
        time.sleep(60)
    """
    other = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, cwd=ROOT)
    assert other.stdout is not None
    assert other.stdout.readline() == b"connected\n"
    other.kill()
    assert reader.wait(ReaderLost, 2).peer_id == "reader"
    other.communicate()


def test_the_owner_hears_of_a_reader_that_leaves(transport: str, reader: Reader) -> None:
    owner = Reader(transport, POOL_BYTES)
    try:
        owner.endpoint.admit("reader", SECRET)
        connection = reader.connect(owner.endpoint.offer(), SECRET)
        connection.close()
        assert owner.wait(ReaderLost).peer_id == "reader"
    finally:
        owner.close()


def test_an_expelled_reader_loses_its_connection_and_its_welcome(transport: str, reader: Reader) -> None:
    owner = Reader(transport, POOL_BYTES)
    try:
        owner.endpoint.admit("reader", SECRET)
        connection = reader.connect(owner.endpoint.offer(), SECRET)
        owner.endpoint.expel("reader")
        owner.endpoint.expel("reader")
        assert reader.wait(ConnectionLost).connection is connection
        reader.start(owner.endpoint.offer(), SECRET)
        reader.wait(ConnectionLost)
        assert owner.endpoint.poll() == []
    finally:
        owner.close()


def test_a_reader_that_reconnects_replaces_its_older_connection(peer: Peer, reader: Reader) -> None:
    first = reader.connect(peer.offer, SECRET)
    reader.start(peer.offer, SECRET)
    lost_or_connected = [reader.wait(object), reader.wait(object)]  # type: ignore[type-var]
    assert sorted(type(event).__name__ for event in lost_or_connected) == ["Connected", "ConnectionLost"]
    (lost,) = [event for event in lost_or_connected if isinstance(event, ConnectionLost)]
    assert lost.connection is first


def test_closing_an_endpoint_leaves_no_thread_descriptor_or_file(transport: str, peer: Peer) -> None:
    before = num_descriptors(), threading.active_count(), os.listdir("/dev/shm")
    reader = Reader(transport, POOL_BYTES)
    connections: list[Connection] = [reader.connect(peer.offer, SECRET)]
    connections[0].pull(1, TWICE, 30)
    reader.endpoint.close()
    assert [type(event) for event in reader.endpoint.poll()] == [PullFailed]
    connections[0].pull(2, ranges((0, 0, 1)), 30)
    assert [type(event) for event in reader.endpoint.poll()] == [PullFailed]
    reader.close()
    reader.endpoint.close()
    assert (num_descriptors(), threading.active_count(), os.listdir("/dev/shm")) == before


def num_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_lost_connection_leaves_no_descriptor(transport: str, reader: Reader) -> None:
    before = num_descriptors()
    for _ in range(3):
        peer = Peer(transport, 100_000, SECRET)
        reader.connect(peer.offer, SECRET)
        peer.kill()
        reader.wait(ConnectionLost)
    del peer
    assert num_descriptors() == before


def test_pieces_are_the_same_copies_within_bounds() -> None:
    copies = ranges((0, 5, 10_000_000), (20_000_000, 30_000_000, 3), (50_000_000, 40_000_000, 0), (60, 70, 1_000_001))
    pieces = cut(copies, 1_000_000, 2)
    assert all(len(piece) <= 2 and piece[:, 2].sum() < 2_000_000 for piece in pieces)
    whole = np.concatenate(pieces)
    assert whole[:, 2].sum() == copies[:, 2].sum()
    assert (whole[:10, 1] - whole[:10, 0] == 5).all()
    assert cut(copies[:0], 1, 1) == []


def test_an_unknown_transport_is_refused_by_name() -> None:
    region = Region.allocate(1)
    with pytest.raises(ValueError, match="'pigeon' is not one of shm, tcp"):
        open_endpoint("pigeon", region, HOST)
    region.close()
