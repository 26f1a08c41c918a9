"""Whoever is not admitted, or does not speak as agreed, gets nothing; and the endpoint serves everybody else on."""

from __future__ import annotations

import gc
import os
import socket
import struct
import time
from collections.abc import Iterator

import msgspec
import numpy as np
import pytest

from kvtransfer import gate, handshake
from kvtransfer.handshake import Hello
from kvtransfer.offer import TransportOffer
from kvtransfer.tcp import FRAME, MAX_ANSWER_BYTES, MAX_RANGES
from kvtransfer.transfer import TRANSPORTS, ConnectionLost, Pulled, PullFailed
from tests.unit.transfer_peer import Peer, Reader

SECRET = b"s" * 32
POOL_BYTES = 1 << 20
ONE = np.array([[0, 0, 1]], np.int64)


@pytest.fixture(params=TRANSPORTS)
def owner(request: pytest.FixtureRequest) -> Iterator[Reader]:
    """An endpoint that has admitted "reader"."""
    owner = Reader(request.param, POOL_BYTES)
    owner.endpoint.admit("reader", SECRET)
    yield owner
    owner.close()


@pytest.fixture
def tcp() -> Iterator[Reader]:
    owner = Reader("tcp", POOL_BYTES)
    owner.endpoint.admit("reader", SECRET)
    yield owner
    owner.close()


def dial(offer: TransportOffer) -> socket.socket:
    if offer.transport == "shm":
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.connect(f"\0{offer.address['name']}")
    else:
        sock = socket.create_connection((str(offer.address["host"]), int(offer.address["port"])))
    sock.settimeout(10)
    return sock


def hello(transport: str, reader: str = "reader", **changes: object) -> bytes:
    body = msgspec.structs.replace(Hello(handshake.VERSION, transport, reader, "owner", bytes(32)), **changes)
    encoded = msgspec.msgpack.encode(body)
    return len(encoded).to_bytes(2, "big") + encoded


def prove(sock: socket.socket, transport: str, secret: bytes = SECRET) -> bytes:
    """A reader's handshake by hand; returns the owner's proof, empty when it refused."""
    greeting = hello(transport)
    sock.sendall(greeting)
    nonce = receive(sock, 32)
    sock.sendall(handshake._proof(secret, b"reader", greeting[2:], nonce))
    return receive(sock, 32)


def receive(sock: socket.socket, num_bytes: int) -> bytes:
    """Up to `num_bytes`, fewer when the other side closes."""
    received = b""
    while len(received) < num_bytes and (more := receive_some(sock, num_bytes - len(received))):
        received += more
    return received


def receive_some(sock: socket.socket, num_bytes: int) -> bytes:
    try:
        return sock.recv(num_bytes)
    except ConnectionResetError:
        return b""


def serves(owner: Reader) -> bool:
    """Whether an honest reader still gets its bytes."""
    reader = Reader(owner.endpoint.transport, POOL_BYTES)
    try:
        reader.connect(owner.endpoint.offer(), SECRET).pull(1, ONE, 10)
        return reader.wait(Pulled).num_bytes == 1
    finally:
        reader.close()


def test_a_reader_with_another_secret_is_refused(owner: Reader) -> None:
    with dial(owner.endpoint.offer()) as sock:
        assert prove(sock, owner.endpoint.transport, b"x" * 32) == b""
    assert serves(owner)


def test_the_right_secret_opens(owner: Reader) -> None:
    with dial(owner.endpoint.offer()) as sock:
        assert len(prove(sock, owner.endpoint.transport)) == 32


def test_a_stranger_is_answered_like_an_admitted_reader_until_its_proof(owner: Reader) -> None:
    with dial(owner.endpoint.offer()) as sock:
        sock.sendall(hello(owner.endpoint.transport, reader="nobody"))
        assert len(receive(sock, 32)) == 32
        sock.sendall(bytes(32))
        assert receive(sock, 1) == b""


def test_a_recorded_handshake_cannot_be_played_again(owner: Reader) -> None:
    transport, greeting = owner.endpoint.transport, hello(owner.endpoint.transport)
    with dial(owner.endpoint.offer()) as sock:
        sock.sendall(greeting)
        proof = handshake._proof(SECRET, b"reader", greeting[2:], receive(sock, 32))
        sock.sendall(proof)
        assert len(receive(sock, 32)) == 32
    with dial(owner.endpoint.offer()) as sock:
        sock.sendall(greeting)
        receive(sock, 32)
        sock.sendall(proof)
        assert receive(sock, 1) == b"", transport


def test_a_readmitted_peer_needs_the_new_secret(owner: Reader) -> None:
    owner.endpoint.admit("reader", b"n" * 32)
    with dial(owner.endpoint.offer()) as sock:
        assert prove(sock, owner.endpoint.transport) == b""
    with dial(owner.endpoint.offer()) as sock:
        assert len(prove(sock, owner.endpoint.transport, b"n" * 32)) == 32


@pytest.mark.parametrize(
    "greeting",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\xff\xff" + bytes(1000),
        b"\x00\x00",
        b"\x00\x10" + os.urandom(16),
        hello("pigeon"),
        hello("pigeon").replace(b"pigeon", b"\xff\xfe\xfd\xfc\xfb\xfa"),  # not UTF-8
        hello("shm", version=2) + hello("tcp", version=2),
        hello("tcp", nonce=b"short"),
        hello("shm", nonce=b"short"),
    ],
)
def test_garbage_is_refused_and_costs_nothing(owner: Reader, greeting: bytes, caplog: pytest.LogCaptureFixture) -> None:
    with dial(owner.endpoint.offer()) as sock:
        sock.sendall(greeting)
        assert receive(sock, 1) == b""
    assert serves(owner)
    gc.collect()  # an exception that nobody has asked for is told now
    assert [record.getMessage() for record in caplog.records if record.name == "asyncio"] == []


def test_silent_strangers_are_bounded_and_let_go_in_time(owner: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many more than may shake hands at once: an honest reader waits for its turn and gets it."""
    monkeypatch.setattr(gate, "HANDSHAKE_S", 0.3)
    strangers = [dial(owner.endpoint.offer()) for _ in range(2 * gate.MAX_HANDSHAKES)]
    started = time.monotonic()
    assert serves(owner)
    assert time.monotonic() - started < 5
    for stranger in strangers:
        assert receive(stranger, 1) == b""
        stranger.close()


def test_an_owner_with_another_secret_is_refused_by_the_reader() -> None:
    """Somebody else listens where the owner did."""
    with socket.create_server(("127.0.0.1", 0)) as impostor:
        reader = Reader("tcp", POOL_BYTES)
        address: dict[str, str | int] = {"host": "127.0.0.1", "port": impostor.getsockname()[1]}
        offer = msgspec.structs.replace(reader.endpoint.offer(), address=address)
        reader.start(offer, SECRET)
        sock, _ = impostor.accept()
        with sock:
            length = int.from_bytes(receive(sock, 2), "big")
            receive(sock, length)
            sock.sendall(bytes(32))
            receive(sock, 32)
            sock.sendall(bytes(32))
            assert "did not prove" in reader.wait(ConnectionLost).reason
        reader.close()


@pytest.mark.parametrize(
    "request_bytes",
    [
        FRAME.pack(0, MAX_RANGES + 1, 1),
        FRAME.pack(0, 1, MAX_ANSWER_BYTES + 1),
        FRAME.pack(0, 1, 2) + struct.pack("<qq", 0, 1),
        FRAME.pack(0, 1, 1) + struct.pack("<qq", POOL_BYTES, 1),
        FRAME.pack(0, 1, 1) + struct.pack("<qq", -1, 1),
        FRAME.pack(0, 1, 0) + struct.pack("<qq", 0, -1),
        FRAME.pack(0, 2, 0) + struct.pack("<qqqq", 0, 1, 0, -1),
        FRAME.pack(0, 2, 2) + struct.pack("<qqqq", 0, 2**63 - 1, 0, 2**63 - 1),
        b"\xff" * 64,
    ],
)
def test_a_request_out_of_bounds_closes_the_connection_and_the_owner_lives(tcp: Reader, request_bytes: bytes) -> None:
    with dial(tcp.endpoint.offer()) as sock:
        prove(sock, "tcp")
        sock.sendall(request_bytes)
        assert receive(sock, 1) == b""
    assert serves(tcp)


def test_a_truncated_request_closes_the_connection_and_the_owner_lives(tcp: Reader) -> None:
    with dial(tcp.endpoint.offer()) as sock:
        prove(sock, "tcp")
        sock.sendall(FRAME.pack(0, 100, 100)[:9])
        sock.shutdown(socket.SHUT_WR)
        assert receive(sock, 1) == b""
    assert serves(tcp)


def test_an_answer_to_another_question_fails_the_pull_before_a_byte_is_written() -> None:
    with socket.create_server(("127.0.0.1", 0)) as impostor:
        reader = Reader("tcp", POOL_BYTES)
        address: dict[str, str | int] = {"host": "127.0.0.1", "port": impostor.getsockname()[1]}
        offer = msgspec.structs.replace(reader.endpoint.offer(), address=address)
        connection = reader.start(offer, SECRET)
        sock, _ = impostor.accept()
        with sock:
            answer_handshake(sock)
            answer_probe(sock)
            connection = reader.next().connection  # type: ignore[union-attr]
            connection.pull(1, ONE, 10)
            sequence, count, num_bytes = FRAME.unpack(receive(sock, FRAME.size))
            receive(sock, 16 * count)
            sock.sendall(FRAME.pack(sequence + 1, 0, num_bytes) + b"\xff" * num_bytes)
            assert "not to our question" in reader.wait(PullFailed).reason
            reader.wait(ConnectionLost)
            assert not reader.pool.any()
        reader.close()


def answer_handshake(sock: socket.socket) -> None:
    greeting = receive(sock, int.from_bytes(receive(sock, 2), "big"))
    sock.sendall(bytes(32))
    receive(sock, 32)
    sock.sendall(handshake._proof(SECRET, b"owner", greeting, bytes(32)))


def answer_probe(sock: socket.socket) -> None:
    for _ in range(3):
        sequence, count, num_bytes = FRAME.unpack(receive(sock, FRAME.size))
        receive(sock, 16 * count)
        sock.sendall(FRAME.pack(sequence, 0, num_bytes) + bytes(num_bytes))


@pytest.mark.parametrize("flags", [0, os.MFD_ALLOW_SEALING])
def test_a_pool_that_could_shrink_or_is_too_small_is_not_mapped(flags: int) -> None:
    """A peer that lies about its memory would kill its reader by SIGBUS."""
    fd = os.memfd_create("liar", flags)
    os.ftruncate(fd, POOL_BYTES)
    assert "could shrink" in lie(fd, POOL_BYTES)


def test_a_pool_smaller_than_offered_is_not_mapped() -> None:
    small = Reader("tcp", 4096)
    assert f"offered {POOL_BYTES} bytes and sent 4096" in lie(os.dup(small.region.fd), POOL_BYTES)
    small.close()


def test_a_descriptor_that_is_no_memory_is_not_mapped() -> None:
    assert "no memory file" in lie(os.open("/dev/zero", os.O_RDWR), POOL_BYTES)


def lie(fd: int, pool_bytes: int) -> str:
    """Plays an owner over shared memory that sends `fd` as its pool; returns what the reader says."""
    name = f"tandem-test-{os.urandom(8).hex()}"
    reader = Reader("shm", 4096)
    offer = msgspec.structs.replace(reader.endpoint.offer(), address={"name": name}, pool_bytes=pool_bytes)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"\0{name}")
        listener.listen()
        reader.start(offer, SECRET)
        sock, _ = listener.accept()
        with sock:
            greeting = receive(sock, int.from_bytes(receive(sock, 2), "big"))
            sock.sendall(bytes(32))
            receive(sock, 32)
            socket.send_fds(sock, [handshake._proof(SECRET, b"owner", greeting, bytes(32))], [fd])
            os.close(fd)
            reason = reader.wait(ConnectionLost).reason
    reader.close()
    return reason


@pytest.mark.parametrize(
    "address", [{}, {"host": "127.0.0.1"}, {"host": "example.org", "port": 1}, {"host": "127.0.0.1", "port": 1 << 20}]
)
def test_a_peers_impossible_address_loses_the_connection(address: dict[str, str | int]) -> None:
    for transport in TRANSPORTS:
        reader = Reader(transport, POOL_BYTES)
        reader.start(msgspec.structs.replace(reader.endpoint.offer(), address=address), SECRET)
        reader.wait(ConnectionLost)
        reader.close()


def test_the_lent_pool_cannot_be_written_by_its_reader() -> None:
    peer = Peer("shm", POOL_BYTES, SECRET)
    try:
        with dial(peer.offer) as sock:
            greeting = hello("shm")
            sock.sendall(greeting)
            sock.sendall(handshake._proof(SECRET, b"reader", greeting[2:], receive(sock, 32)))
            _, (fd,), _, _ = socket.recv_fds(sock, 32, 1)
            with pytest.raises(PermissionError):
                os.write(fd, b"x")
            with pytest.raises(PermissionError):
                os.ftruncate(fd, 0)
            os.close(fd)
    finally:
        peer.kill()
