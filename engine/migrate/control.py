"""The control channel's sockets: one ROUTER that our readers dial, one DEALER to each owner that we read.

Nothing here waits: what cannot be sent now has not been sent.
"""

from __future__ import annotations

from urllib.parse import urlsplit

import zmq

from kvtransfer.protocol import MAX_CONTROL_BYTES

MAX_ROUTING_ID_BYTES = 255  # ZMQ's bound
CONTROL_QUEUE = 10_000  # messages waiting for one peer, before it counts as unreachable
HANDSHAKE_MS = 5000  # a peer that was frozen is dialled afresh, a silent stranger is let go
HEARTBEAT_MS = 2000
SILENCE_MS = 6000  # then the connection is dropped, and dialled again

Context = zmq.Context[zmq.Socket[bytes]]
Socket = zmq.Socket[bytes]


def listen(context: Context, host: str) -> tuple[Socket, str]:
    """The socket on which readers reach us, and its address."""
    router = _socket(context, zmq.ROUTER)
    router.setsockopt(zmq.ROUTER_MANDATORY, 1)
    router.setsockopt(zmq.ROUTER_HANDOVER, 1)
    port = router.bind_to_random_port(f"tcp://{host}")
    return router, f"tcp://{host}:{port}"


def dial(context: Context, address: str, routing_id: bytes) -> Socket:
    """Towards an owner, under the id that it drew for us. Raises zmq.ZMQError for an address that cannot be one."""
    dealer = _socket(context, zmq.DEALER)
    try:
        dealer.setsockopt(zmq.ROUTING_ID, routing_id)
        dealer.connect(address)
    except zmq.ZMQError:
        dealer.close(linger=0)
        raise
    return dealer


def send(socket: Socket, frames: list[bytes]) -> bool:
    """False when the peer is gone or does not read."""
    try:
        socket.send_multipart(frames, zmq.NOBLOCK)
    except zmq.ZMQError as error:
        if error.errno not in (zmq.EAGAIN, zmq.EHOSTUNREACH, zmq.ENOTSOCK):
            raise
        return False
    return True


def is_address(address: str) -> bool:
    """Whether it reads tcp://host:port."""
    try:
        parts = urlsplit(address)
        return parts.scheme == "tcp" and bool(parts.hostname) and bool(parts.port)
    except ValueError:  # a port out of range, or half an IPv6 address
        return False


def _socket(context: Context, kind: int) -> Socket:
    socket = context.socket(kind)
    socket.setsockopt(zmq.SNDHWM, CONTROL_QUEUE)
    socket.setsockopt(zmq.RCVHWM, CONTROL_QUEUE)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_CONTROL_BYTES)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
    socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, SILENCE_MS)
    return socket
