"""The engines this one is paired with: who may read our pool, and whose pools we read.

    initialize(peer) ─▶ Pairing: a routing id and a secret drawn for this peer; it is admitted as a reader
    connect(peer)    ─▶ Link: a control socket to the peer and a transport connection, best transport first
    connection lost  ─▶ tried again with growing pauses, until it is back or the peer shows another incarnation

Pairing twice is harmless: a healthy link to the same incarnation is left as it is; another incarnation replaces it.
"""

from __future__ import annotations

import hmac
import logging
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import msgspec
import zmq

from engine.api.errors import Conflict, InvalidRequest, TandemError, Unavailable
from engine.core import ModelInfo
from engine.messages import LinkStats
from engine.migrate import control
from kvtransfer.copies import Copies
from kvtransfer.layout import KVLayout
from kvtransfer.offer import TransportOffer
from kvtransfer.protocol import PROTOCOL_VERSION, EndpointInfo, FromOwner, FromReader
from kvtransfer.transfer import Connection, Endpoint, choose

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 5.0
MAX_RETRY_PAUSE_S = 10.0
MAX_PAIRINGS = 1024

_encode = msgspec.msgpack.Encoder().encode

Answer = Callable[[str | TandemError], None]  # the transport's name, or why there is no link


@dataclass(slots=True)
class Pairing:
    """What we handed to one peer."""

    me: str  # the id under which it knows us
    routing_id: bytes
    secret: bytes


@dataclass(slots=True, eq=False)
class Link:
    """A peer whose pool we read. Implements handoff.Source."""

    peer: str
    info: EndpointInfo
    control: zmq.Socket[bytes]
    connection: Connection | None = None
    gigabytes_per_s: float = 0.0
    connected: bool = False
    failed: set[str] = field(default_factory=set)  # transports tried in vain in this round
    retry_at: float | None = None
    retry_pause_s: float = 0.25
    answers: list[Answer] = field(default_factory=list)  # who waits for the connect under way

    @property
    def incarnation(self) -> str:
        return self.info.incarnation

    @property
    def layout(self) -> KVLayout:
        return self.info.layout

    @property
    def transport(self) -> str:
        return self.connection.transport if self.connection is not None else ""

    def send(self, message: FromReader) -> bool:
        return control.send(self.control, [_encode(message)])

    def pull(self, transfer_id: int, copies: Copies, deadline_s: float) -> None:
        assert self.connection is not None, "only connected links are handed out"
        self.connection.pull(transfer_id, copies, deadline_s)


@dataclass(frozen=True, slots=True)
class LinkPolicy:
    """What the operator allows."""

    cluster_key: bytes
    transports: tuple[str, ...]
    require_transport: str | None
    reads: bool  # a prefill engine owns and never reads


class Links:
    """All pairings and links of one engine core."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        host: str,
        incarnation: str,
        model: ModelInfo,
        layout: KVLayout,
        endpoints: dict[str, Endpoint],
        policy: LinkPolicy,
    ) -> None:
        self._context = context
        self._incarnation = incarnation
        self._model = model
        self._layout = layout
        self._endpoints = endpoints
        self._policy = policy
        self.on_source_lost: Callable[[str, str], None] = lambda peer, reason: None  # who pulls over our links
        self._pairings: dict[str, Pairing] = {}
        self._readers: dict[bytes, str] = {}  # routing id -> peer
        self._links: dict[str, Link] = {}
        self.router, self.control_address = control.listen(context, host)

    def initialize(self, peer: str, me: str) -> EndpointInfo:
        """What the peer needs to read from us; the same again when it asks again."""
        pairing = self._pairings.get(peer)
        if pairing is None:
            if len(self._pairings) >= MAX_PAIRINGS:
                raise Unavailable(f"this engine is paired with {MAX_PAIRINGS} engines already; drop one first")
            pairing = Pairing(me, secrets.token_bytes(16), secrets.token_bytes(32))
            self._pairings[peer] = pairing
            self._readers[pairing.routing_id] = peer
            for endpoint in self._endpoints.values():
                endpoint.admit(peer, self._proof(pairing.secret))
        pairing.me = me
        return EndpointInfo(
            tandem=PROTOCOL_VERSION,
            engine_id=me,
            incarnation=self._incarnation,
            model=self._model.name,
            layout=self._layout,
            offers=[endpoint.offer() for endpoint in self._endpoints.values()],
            routing_id=pairing.routing_id.hex(),
            secret=pairing.secret.hex(),
        )

    def connect(self, peer: str, control_address: str, endpoint_info: str, answer: Answer) -> None:
        """Pairs with what the peer told about itself; `answer` is called once, now or when the transport is up. Raises
        InvalidRequest or Conflict, with nothing changed, when this is not a peer to pair with."""
        info = self._parse(peer, control_address, endpoint_info)
        link = self._links.get(peer)
        if link is not None and link.info == info:
            self._await(link, answer)
            return
        socket = self._dial(control_address, info) if self._policy.reads else None
        if link is not None:
            self._close(link, "the peer has restarted")
        if socket is None:
            answer(self._choose(info, set()).transport)
            return
        link = Link(peer, info, socket)
        self._links[peer] = link
        link.answers.append(answer)
        self._attempt(link)

    def disconnect(self, peer: str) -> None:
        """p2p_drop_connect: the peer may no longer read, and is no longer read. Idempotent."""
        link = self._links.get(peer)
        if link is not None:
            self._close(link, "disconnected")
        pairing = self._pairings.pop(peer, None)
        if pairing is not None:
            del self._readers[pairing.routing_id]
            for endpoint in self._endpoints.values():
                endpoint.expel(peer)

    def source_of(self, peer: str) -> Link | None:
        return self._links.get(peer)

    def send_to_reader(self, reader: str, message: FromOwner) -> bool:
        pairing = self._pairings.get(reader)
        return pairing is not None and control.send(self.router, [pairing.routing_id, _encode(message)])

    def reader_of(self, routing_id: bytes) -> str | None:
        """Who speaks on our control channel; None is a stranger."""
        return self._readers.get(routing_id)

    def controls(self) -> Iterator[tuple[zmq.Socket[bytes], str]]:
        """The sockets on which owners answer us."""
        for link in self._links.values():
            yield link.control, link.peer

    def established(self, connection: Connection, gigabytes_per_s: float) -> None:
        link = self._link_of(connection)
        if link is None:
            return
        link.connected, link.gigabytes_per_s = True, gigabytes_per_s
        link.retry_at, link.retry_pause_s = None, 0.25
        link.failed.clear()
        logger.info("reading from %s over %s, %.1f GB/s", link.peer, link.transport, gigabytes_per_s)
        self._settle(link, link.transport)

    def lost(self, connection: Connection, reason: str) -> None:
        link = self._link_of(connection)
        if link is None:
            return
        logger.warning("lost %s over %s: %s", link.peer, connection.transport, reason)
        if not link.connected:
            link.failed.add(connection.transport)
        link.connected, link.connection = False, None
        self.on_source_lost(link.peer, f"{link.peer}: {reason}")
        self._attempt(link)

    def tick(self) -> None:
        now = time.monotonic()
        for link in list(self._links.values()):
            if link.retry_at is not None and link.retry_at <= now:
                link.failed.clear()
                self._attempt(link)

    def stats(self) -> list[LinkStats]:
        return [
            LinkStats(
                peer=link.peer,
                transport=link.transport,
                gigabytes_per_s=link.gigabytes_per_s,
                connected=link.connected,
            )
            for link in self._links.values()
        ]

    def close(self) -> None:
        for link in list(self._links.values()):
            self._close(link, "this engine is stopping")
        self.router.close(linger=0)

    def _parse(self, peer: str, control_address: str, endpoint_info: str) -> EndpointInfo:
        if peer not in self._pairings:
            raise Conflict(f"{peer} is not paired with this engine: POST /distserve/p2p_initialize comes first")
        try:
            info = msgspec.json.decode(endpoint_info, type=EndpointInfo)
            bytes.fromhex(info.secret)
            if not 0 < len(bytes.fromhex(info.routing_id)) <= control.MAX_ROUTING_ID_BYTES:
                raise ValueError(f"its routing_id has not 1 to {control.MAX_ROUTING_ID_BYTES} bytes")
        except (msgspec.DecodeError, ValueError) as error:
            raise InvalidRequest(f"endpoint_info of {peer} is not one of this engine's kind: {error}") from error
        if info.tandem != PROTOCOL_VERSION:
            raise InvalidRequest(f"{peer} speaks transfer protocol {info.tandem}, this engine {PROTOCOL_VERSION}")
        if info.model != self._model.name:
            raise InvalidRequest(f"{peer} serves {info.model!r}, this engine {self._model.name!r}: their KV differs")
        if not control.is_address(control_address):
            raise InvalidRequest(f"zmq_address is {control_address!r}, expected tcp://host:port")
        self._check_layout(peer, info.layout)
        return info

    def _check_layout(self, peer: str, layout: KVLayout) -> None:
        for name in ("num_layers", "head_dim", "dtype"):
            theirs, ours = getattr(layout, name), getattr(self._layout, name)
            if theirs != ours:
                raise InvalidRequest(f"{peer} has KV {name} {theirs}, this engine {ours}: start both with the same")
        if min(layout.num_blocks, layout.block_size, layout.num_kv_heads) < 1:
            raise InvalidRequest(f"{peer} describes an empty pool")

    def _dial(self, control_address: str, info: EndpointInfo) -> zmq.Socket[bytes]:
        try:
            return control.dial(self._context, control_address, bytes.fromhex(info.routing_id))
        except zmq.ZMQError as error:
            raise InvalidRequest(f"zmq_address {control_address!r} cannot be connected to: {error}") from error

    def _attempt(self, link: Link) -> None:
        """Connects by the best transport not yet tried in this round; when none is left, pauses."""
        try:
            offer = self._choose(link.info, link.failed)
        except Unavailable as error:
            self._settle(link, error)
            link.retry_at = time.monotonic() + link.retry_pause_s
            link.retry_pause_s = min(2 * link.retry_pause_s, MAX_RETRY_PAUSE_S)
            return
        link.retry_at = None
        pairing, secret = self._pairings[link.peer], bytes.fromhex(link.info.secret)
        endpoint = self._endpoints[offer.transport]
        link.connection = endpoint.connect(link.peer, offer, pairing.me, self._proof(secret), CONNECT_TIMEOUT_S)

    def _choose(self, info: EndpointInfo, failed: set[str]) -> TransportOffer:
        ours = [endpoint.offer() for endpoint in self._endpoints.values()]
        required = self._policy.require_transport
        allowed = [name for name in self._policy.transports if name not in failed and required in (None, name)]
        try:
            return choose(ours, info.offers, allowed, required)
        except ValueError as error:
            raise Unavailable(f"no transport to {info.engine_id}: {error}") from error

    def _await(self, link: Link, answer: Answer) -> None:
        if link.connected:
            answer(link.transport)
            return
        link.answers.append(answer)
        if link.connection is None:
            link.failed.clear()
            self._attempt(link)

    def _settle(self, link: Link, outcome: str | TandemError) -> None:
        answers, link.answers = link.answers, []
        for answer in answers:
            answer(outcome)

    def _close(self, link: Link, reason: str) -> None:
        del self._links[link.peer]
        connection, link.connection, link.connected = link.connection, None, False
        self._settle(link, Unavailable(f"{link.peer}: {reason}"))
        self.on_source_lost(link.peer, reason)
        if connection is not None:
            connection.close()
        link.control.close(linger=100)

    def _link_of(self, connection: Connection) -> Link | None:
        link = self._links.get(connection.peer_id)
        return link if link is not None and link.connection is connection else None

    def _proof(self, secret: bytes) -> bytes:
        """Both the link's secret and the cluster key are needed to read a pool."""
        return hmac.digest(self._policy.cluster_key, secret, "sha256")
