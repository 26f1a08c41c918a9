"""Transport between processes of one kernel: the reader maps the owner's pool and copies out of it by itself.

The owner listens on an abstract Unix socket (no file to leave behind), and after the handshake passes the descriptor of
its memory file, which the seals let nobody else write or shrink. Then the socket stays silent: its end, or the end of
the process behind it, tells each side that the other is gone. The owner does no work at all for a pull, so it may be
deep in a forward pass, or stopped.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import struct
from collections.abc import Callable

from kvtransfer.copies import CopyRanges, copy_ranges, cut
from kvtransfer.endpoint import SocketEndpoint
from kvtransfer.handshake import PROOF_BYTES, HandshakeError, introduce, verify_owner
from kvtransfer.memory import BorrowedRegion, Region
from kvtransfer.offer import TransportOffer
from kvtransfer.reader import Pull, ReadingConnection
from kvtransfer.stream import readable, settle

SLICE_BYTES = 16 << 20  # between two looks at deadlines and at the owner: a few milliseconds
SLICE_RANGES = 4096
BACKLOG = 64
MAX_DESCRIPTORS = 4  # asked of the kernel, so that a peer cannot send us more; exactly one is right


class ShmEndpoint(SocketEndpoint):
    """Implements transfer.Endpoint."""

    transport = "shm"

    def __init__(self, region: Region, host_id: str, copy: CopyRanges = copy_ranges) -> None:
        self._name = f"tandem-{secrets.token_hex(16)}"
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(f"\0{self._name}")
        listener.listen(BACKLOG)
        super().__init__(region, host_id, copy, listener, ShmConnection)

    def offer(self) -> TransportOffer:
        return self._offer({"name": self._name})

    async def _serve(self, sock: socket.socket, proof: bytes) -> None:
        socket.send_fds(sock, [proof], [self._region.fd])
        gone: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        watch = Watch(sock, lambda reason: settle(gone, reason))
        try:
            raise EOFError(await gone)
        finally:
            watch.close()


class Watch:
    """Calls `on_gone` with a reason, once or more, when the process at the other end of a silent socket closes, speaks
    or dies. Its death is watched for itself, because a forked child could hold the socket open."""

    def __init__(self, sock: socket.socket, on_gone: Callable[[str], object]) -> None:
        self._loop = asyncio.get_running_loop()
        self._sock = sock
        self._on_gone = on_gone
        self._process = _open_process(sock)
        self._loop.add_reader(sock, self._hear)
        if self._process is not None:
            self._loop.add_reader(self._process, self._die)

    def close(self) -> None:
        """Before the socket is closed."""
        self._loop.remove_reader(self._sock)
        if self._process is not None:
            self._loop.remove_reader(self._process)
            os.close(self._process)

    def _hear(self) -> None:
        self._loop.remove_reader(self._sock)
        try:
            spoke = self._sock.recv(1)
        except OSError as error:
            self._on_gone(f"the peer is gone: {error}")
        else:
            self._on_gone("the peer spoke out of turn" if spoke else "the peer closed the connection")

    def _die(self) -> None:
        assert self._process is not None
        self._loop.remove_reader(self._process)
        self._on_gone("the peer's process died")


class ShmConnection(ReadingConnection):
    transport = "shm"
    _sock: socket.socket | None = None
    _pool: BorrowedRegion | None = None
    _watch: Watch | None = None

    async def _open(self) -> None:
        target = self._target
        self._sock = sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, f"\0{target.offer.address.get('name')}")
        expected = await introduce(sock, self.transport, target.my_id, target.peer_id, target.secret)
        await readable(sock)
        self._pool = _receive_pool(sock, expected, target.offer.pool_bytes)

    async def _serve(self) -> None:
        assert self._sock is not None
        self._watch = Watch(self._sock, self._lose)
        while True:
            pull = await self._next()
            pull.asked = True
            await self._read(pull)
            self._succeed(pull)

    async def _read(self, pull: Pull) -> None:
        assert self._pool is not None
        for piece in cut(pull.copies, SLICE_BYTES, SLICE_RANGES):
            if pull.ended:
                return
            self._copy(self._pool.buffer, pull.destination, piece)
            await asyncio.sleep(0)

    def _release(self) -> None:
        if self._watch is not None:
            self._watch.close()
        if self._pool is not None:
            self._pool.close()
        if self._sock is not None:
            self._sock.close()


def _receive_pool(sock: socket.socket, expected: bytes, num_bytes: int) -> BorrowedRegion:
    """The owner's proof and its pool, which come in one message."""
    proof, descriptors, _, _ = socket.recv_fds(sock, PROOF_BYTES, MAX_DESCRIPTORS, socket.MSG_CMSG_CLOEXEC)
    try:
        if not proof:
            raise EOFError("the owner refused this reader")
        verify_owner(proof, expected)
        if len(descriptors) != 1:
            raise HandshakeError(f"the owner sent {len(descriptors)} descriptors instead of its pool")
        return BorrowedRegion.of(descriptors[0], num_bytes)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _open_process(sock: socket.socket) -> int | None:
    """A pidfd of the process at the other end; None when its process namespace is not visible from here."""
    pid, _, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    if pid == 0:
        return None
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        raise EOFError("the peer died") from None
