"""The handshake of two engines done by hand, so that a test can stand between them, or pretend to be one of them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from deploy import probe
from tests.cluster.local_cluster import LocalCluster
from tests.faults.relay import Relay

PROTOCOL = 1  # TCP, LMDeploy's integer
ENGINE_CONFIG = {"block_size": 16, "num_gpu_blocks": 100}


@dataclass(frozen=True)
class Offer:
    """What an engine answers to p2p_initialize."""

    zmq_address: str
    info: dict[str, Any]

    @property
    def tcp(self) -> tuple[str, int]:
        """Where its pool is read over TCP."""
        address = next(offer["address"] for offer in self.info["offers"] if offer["transport"] == "tcp")
        return address["host"], address["port"]

    def by_tcp(self, port: int) -> dict[str, Any]:
        """Its information, with TCP alone, at another port."""
        offers = [offer for offer in self.info["offers"] if offer["transport"] == "tcp"]
        moved = [offer | {"address": {"host": "127.0.0.1", "port": port}} for offer in offers]
        return self.info | {"offers": moved}


def initialize(engine_url: str, peer: str) -> Offer:
    body = {
        "local_engine_id": engine_url,
        "local_engine_config": ENGINE_CONFIG,
        "remote_engine_id": peer,
        "remote_engine_config": ENGINE_CONFIG,
        "protocol": PROTOCOL,
    }
    reply = json.loads(probe.ask(f"{engine_url}/distserve/p2p_initialize", body))
    info = json.loads(reply["kvtransfer_endpoint_info"][0]["endpoint_info"])
    return Offer(reply["engine_endpoint_info"]["zmq_address"], info)


def connect_body(peer: str, zmq_address: str, info: Any) -> dict[str, Any]:
    endpoint = {"protocol": PROTOCOL, "endpoint_info": info if isinstance(info, str) else json.dumps(info)}
    return {
        "protocol": PROTOCOL,
        "remote_engine_id": peer,
        "remote_engine_endpoint_info": {"zmq_address": zmq_address},
        "remote_kvtransfer_endpoint_info": [endpoint],
    }


@contextlib.contextmanager
def relayed(cluster: LocalCluster) -> Iterator[Relay]:
    """Decode reads prefill's pool over TCP, through a relay; afterwards as before."""
    prefill, decode = cluster.url("prefill-1"), cluster.url("decode-1")
    offer = initialize(prefill, decode)
    connect = f"{decode}/distserve/p2p_connect"
    with Relay(*offer.tcp) as relay:
        probe.ask(connect, connect_body(prefill, offer.zmq_address, offer.by_tcp(relay.port)))
        try:
            yield relay
        finally:
            probe.ask(connect, connect_body(prefill, offer.zmq_address, offer.info))
