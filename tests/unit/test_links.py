"""What a peer says of itself is checked before it is used: a wrong word costs an error, never the engine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import msgspec
import pytest
import zmq

from engine.api.errors import Conflict, InvalidRequest, TandemError, Unavailable
from engine.migrate.links import LinkPolicy, Links
from kvtransfer.copies import Copies
from kvtransfer.offer import TransportOffer
from kvtransfer.protocol import EndpointInfo
from kvtransfer.transfer import Connection, Endpoint
from tests.unit.fake_core import LAYOUT, MODEL

ME, PEER = "http://127.0.0.1:1", "http://127.0.0.1:2"
ADDRESS = "tcp://127.0.0.1:9"


@pytest.fixture
def links() -> Iterator[Links]:
    """Of an engine without transports: pairing goes as far as the choice of one."""
    policy = LinkPolicy(cluster_key=b"", transports=("shm", "tcp"), require_transport=None, reads=True)
    with zmq.Context() as context:
        links = Links(context, "127.0.0.1", "one", MODEL, LAYOUT, {}, policy)
        yield links
        links.close()


@pytest.fixture
def info(links: Links) -> EndpointInfo:
    """What the peer would say; `links` has been told to expect it."""
    links.initialize(PEER, ME)
    return msgspec.structs.replace(links.initialize(PEER, ME), engine_id=PEER)


def connect(links: Links, info: EndpointInfo, address: str = ADDRESS) -> list[str | TandemError]:
    answers: list[str | TandemError] = []
    links.connect(PEER, address, msgspec.json.encode(info).decode(), answers.append)
    return answers


def test_a_good_word_gets_as_far_as_the_transports(links: Links, info: EndpointInfo) -> None:
    (answer,) = connect(links, info)
    assert isinstance(answer, Unavailable)
    assert "no transport" in answer.message


@pytest.mark.parametrize(
    "address",
    [
        "",
        "127.0.0.1:9",
        "http://127.0.0.1:9",
        "ipc:///tmp/x",
        "tcp://127.0.0.1",
        "tcp://127.0.0.1:0",
        "tcp://127.0.0.1:99999",
        "tcp://127.0.0.1:x",
        "tcp://[::1:9",
        "tcp://*:9",
        "tcp://no host:9",
    ],
)
def test_an_address_that_is_none_is_refused(address: str, links: Links, info: EndpointInfo) -> None:
    with pytest.raises(InvalidRequest, match="zmq_address"):
        connect(links, info, address)
    assert not list(links.controls())


@pytest.mark.parametrize(
    "change",
    [
        {"tandem": 2},
        {"model": "another"},
        {"routing_id": ""},
        {"routing_id": "aa" * 256},
        {"routing_id": "no hex"},
        {"secret": "no hex"},
        {"layout": msgspec.structs.replace(LAYOUT, num_layers=3)},
        {"layout": msgspec.structs.replace(LAYOUT, dtype="float16")},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_peer_that_does_not_fit_is_refused(change: dict[str, Any], links: Links, info: EndpointInfo) -> None:
    with pytest.raises(InvalidRequest):
        connect(links, msgspec.structs.replace(info, **change))
    assert not list(links.controls())


def test_a_refusal_leaves_the_link_that_there_is(links: Links, info: EndpointInfo) -> None:
    connect(links, info)
    before = list(links.controls())
    with pytest.raises(InvalidRequest):
        connect(links, msgspec.structs.replace(info, incarnation="two"), "tcp://*:9")
    assert list(links.controls()) == before


def test_nobody_is_connected_unannounced(links: Links, info: EndpointInfo) -> None:
    links.disconnect(PEER)
    with pytest.raises(Conflict, match="p2p_initialize comes first"):
        connect(links, info)


class Dialled:
    """A transport that only remembers under which id it was asked to connect."""

    transport = "tcp"

    def __init__(self) -> None:
        self.ids: list[str] = []

    def offer(self) -> TransportOffer:
        return TransportOffer(transport="tcp", host_id="here", address={}, pool_bytes=1)

    def admit(self, peer_id: str, secret: bytes) -> None:
        pass

    def connect(self, peer_id: str, offer: TransportOffer, my_id: str, secret: bytes, deadline_s: float) -> Connection:
        self.ids.append(my_id)
        return Hung(peer_id)


class Hung:
    transport = "tcp"

    def __init__(self, peer_id: str) -> None:
        self.peer_id = peer_id

    def pull(self, transfer_id: int, copies: Copies, deadline_s: float) -> None:
        raise AssertionError("it never connected")

    def close(self) -> None:
        pass


def test_we_are_who_the_last_introduction_said() -> None:
    """Whoever introduces engines may come to know us by another address: the peer has admitted that one."""
    policy = LinkPolicy(cluster_key=b"", transports=("tcp",), require_transport=None, reads=True)
    dialled = Dialled()
    with zmq.Context() as context:
        links = Links(context, "127.0.0.1", "one", MODEL, LAYOUT, {"tcp": cast(Endpoint, dialled)}, policy)
        links.initialize(PEER, ME)
        info = links.initialize(PEER, "http://10.0.0.1:1")
        connect(links, msgspec.structs.replace(info, engine_id=PEER))
        links.close()
    assert dialled.ids == ["http://10.0.0.1:1"]
