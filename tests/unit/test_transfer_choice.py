"""Which transport a pair of engines uses, and what it says when there is none."""

from __future__ import annotations

import json

import msgspec
import pytest

from kvtransfer.offer import TransportOffer
from kvtransfer.transfer import choose, host_id

ALL = ["shm", "tcp"]


def offer(transport: str, host: str = "here") -> TransportOffer:
    return TransportOffer(transport=transport, host_id=host, address={}, pool_bytes=1)


def test_shared_memory_wins_on_one_host() -> None:
    assert choose([offer("tcp"), offer("shm")], [offer("tcp"), offer("shm")], ALL).transport == "shm"


def test_tcp_between_hosts() -> None:
    theirs = [offer("shm", "there"), offer("tcp", "there")]
    assert choose([offer("shm"), offer("tcp")], theirs, ALL) is theirs[1]


def test_only_what_is_allowed_and_offered_by_both() -> None:
    both = [offer("shm"), offer("tcp")]
    assert choose(both, both, ["tcp"]).transport == "tcp"
    assert choose([offer("tcp")], both, ALL).transport == "tcp"
    assert choose(both, [offer("pigeon"), offer("tcp")], ["pigeon", "tcp"]).transport == "tcp"


def test_none_in_common_says_what_was_offered() -> None:
    with pytest.raises(ValueError, match="shm, tcp wanted here, shm offered there"):
        choose([offer("shm"), offer("tcp")], [offer("shm", "there")], ALL)


def test_a_required_transport_is_used_or_refused_never_replaced() -> None:
    both = [offer("shm"), offer("tcp")]
    assert choose(both, both, ALL, require="shm").transport == "shm"
    assert choose(both, both, ALL, require="tcp").transport == "tcp"
    with pytest.raises(ValueError, match="shm wanted here, shm, tcp offered there"):
        choose(both, [offer("shm", "there"), offer("tcp", "there")], ALL, require="shm")


@pytest.mark.parametrize("num_bytes", [-1, 0, 1 << 50, 1 << 63, 10**30])
def test_an_offer_of_a_pool_of_no_possible_size_is_refused_where_it_is_parsed(num_bytes: int) -> None:
    told = {"transport": "tcp", "host_id": "there", "address": {}, "pool_bytes": num_bytes}
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(json.dumps(told), type=TransportOffer)


def test_a_host_has_one_id() -> None:
    assert host_id() == host_id()
    assert "/" in host_id()
