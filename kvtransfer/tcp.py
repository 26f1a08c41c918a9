"""Transport between hosts: plain TCP, read with scatter/gather straight into the pool.

Long ranges go from pages of the one pool into the other, and the owner, busy with prefill, does not even copy them
(sendfile). Short ones, between pools of different block sizes or heads, are packed on both sides: a memory copy costs
less than the kernel's work for a range.

After the handshake the reader sends requests and the owner answers each in order:

    request   sequence u32 | count u32 | total bytes u64 | count x (offset i64, length i64)
    answer    sequence u32 | 0 u32     | total bytes u64 | the bytes of all ranges, one after another

All integers are little-endian. A request that is out of bounds, or an answer that is not to the question, closes the
connection: an engine of ours never sends one.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import struct
from collections import deque
from dataclasses import dataclass

import numpy as np

from kvtransfer.copies import Copies, CopyRanges, Scratch, check, copy_ranges, cut, pack
from kvtransfer.endpoint import SocketEndpoint
from kvtransfer.events import EventQueue
from kvtransfer.handshake import PROOF_BYTES, introduce, verify_owner
from kvtransfer.memory import Region
from kvtransfer.offer import TransportOffer
from kvtransfer.reactor import Reactor
from kvtransfer.reader import Pull, ReadingConnection, Target
from kvtransfer.stream import receive_exactly, receive_views, send_file, send_views

FRAME = struct.Struct("<IIQ")
RANGE_BYTES = 16
MAX_RANGES = 2048  # of one request: 32 KiB, so that two of them never fill the owner's receive buffer
MAX_ANSWER_BYTES = 16 << 20
LONG_BYTES = 16 << 10  # ranges of this mean length travel from where they lie to where they go; shorter ones packed
WINDOW = 2  # requests under way: the owner always has the next one when it ends one
REQUEST_S = 10.0  # from a request's header to its last byte
STALL_S = 30.0  # for the reader to take one answer
BACKLOG = 64
KEEPALIVE_IDLE_S, KEEPALIVE_INTERVAL_S, KEEPALIVE_COUNT = 10, 5, 3
USER_TIMEOUT_MS = 20_000


class TcpEndpoint(SocketEndpoint):
    """Implements transfer.Endpoint."""

    transport = "tcp"

    def __init__(self, region: Region, host: str, host_id: str, copy: CopyRanges = copy_ranges) -> None:
        """`host` is the address of this machine that peers reach; the port is a free one. Raises OSError when it cannot
        be listened on."""
        family, _, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        listener = socket.create_server(address[:2], family=family, backlog=BACKLOG)
        super().__init__(region, host_id, copy, listener, TcpConnection)
        self._host, self._port = listener.getsockname()[:2]

    def offer(self) -> TransportOffer:
        return self._offer({"host": self._host, "port": self._port})

    async def _serve(self, sock: socket.socket, proof: bytes) -> None:
        _tune(sock)
        scratch = Scratch()
        await asyncio.get_running_loop().sock_sendall(sock, proof)
        while True:
            header = await receive_exactly(sock, FRAME.size)
            async with asyncio.timeout(REQUEST_S):
                sequence, ranges = await _receive_request(sock, header, self._region.num_bytes)
            async with asyncio.timeout(STALL_S):
                await self._answer(sock, sequence, ranges, scratch)

    async def _answer(self, sock: socket.socket, sequence: int, ranges: Copies, scratch: Scratch) -> None:
        num_bytes = int(ranges[:, 1].sum())
        header, pool = FRAME.pack(sequence, 0, num_bytes), self._region.buffer
        if num_bytes < len(ranges) * LONG_BYTES:
            packed = scratch.view(num_bytes)
            self._copy(pool, packed, np.insert(ranges, 1, pack(ranges[:, 1]), axis=1))
            await send_views(sock, [memoryview(header), packed])
        elif self._region.huge:
            views = [pool[offset : offset + length] for offset, length in ranges.tolist()]
            await send_views(sock, [memoryview(header), *views])
        else:
            await asyncio.get_running_loop().sock_sendall(sock, header)
            await send_file(sock, self._region.fd, [(offset, length) for offset, length in ranges.tolist()])


@dataclass(slots=True, eq=False)
class Question:
    """One request of a pull."""

    pull: Pull
    copies: Copies
    sequence: int
    last: bool = False  # of its pull

    @property
    def num_bytes(self) -> int:
        return int(self.copies[:, 2].sum())


class TcpConnection(ReadingConnection):
    transport = "tcp"

    def __init__(self, target: Target, region: Region, copy: CopyRanges, reactor: Reactor, events: EventQueue) -> None:
        super().__init__(target, region, copy, reactor, events)
        self._sock: socket.socket | None = None
        self._sequence = 0
        self._unasked: deque[Question] = deque()
        self._scratch = Scratch()

    async def _open(self) -> None:
        target = self._target
        address = _parse_address(target.offer.address)
        self._sock = sock = socket.socket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET, socket.SOCK_STREAM)
        sock.setblocking(False)
        _tune(sock)
        await asyncio.get_running_loop().sock_connect(sock, address)
        expected = await introduce(sock, self.transport, target.my_id, target.peer_id, target.secret)
        verify_owner(await receive_exactly(sock, PROOF_BYTES), expected)

    async def _serve(self) -> None:
        """Asks ahead, over the borders of pulls, by at most WINDOW requests."""
        asked: deque[Question] = deque()
        while True:
            if not asked:
                await self._idle()
            while len(asked) < WINDOW and (question := self._take()):
                await self._ask(question)
                asked.append(question)
            question = asked.popleft()
            await self._receive(question)
            if question.last:
                self._succeed(question.pull)

    async def _read(self, pull: Pull) -> None:
        for question in self._questions(pull):
            await self._ask(question)
            await self._receive(question)

    async def _idle(self) -> None:
        """Returns when there is a pull to ask for. Until then the owner has nothing to say."""
        assert self._sock is not None
        self._reactor.loop.add_reader(self._sock, self._hear)
        try:
            await self._next()
        finally:
            self._reactor.loop.remove_reader(self._sock)

    def _hear(self) -> None:
        assert self._sock is not None
        try:
            spoke = self._sock.recv(1)
        except OSError as error:
            self._lose(f"tcp to {self.peer_id}: {error}")
        else:
            self._lose(f"tcp to {self.peer_id}: the owner {'spoke out of turn' if spoke else 'closed the connection'}")
        self._reactor.loop.remove_reader(self._sock)

    def _take(self) -> Question | None:
        if not self._unasked:
            pull = next((pull for pull in self._pulls if not pull.asked), None)
            if pull is None:
                return None
            pull.asked = True
            self._unasked.extend(self._questions(pull))
        return self._unasked.popleft()

    def _questions(self, pull: Pull) -> list[Question]:
        pieces = cut(pull.copies, MAX_ANSWER_BYTES // 2, MAX_RANGES) or [pull.copies[:0]]
        questions = [Question(pull, piece, self._sequence + i) for i, piece in enumerate(pieces)]
        questions[-1].last = True
        self._sequence = (self._sequence + len(pieces)) % (1 << 31)
        return questions

    async def _ask(self, question: Question) -> None:
        assert self._sock is not None
        ranges = np.ascontiguousarray(question.copies[:, [0, 2]], "<i8")
        header = FRAME.pack(question.sequence, len(ranges), question.num_bytes)
        await self._reactor.loop.sock_sendall(self._sock, header + ranges.tobytes())

    async def _receive(self, question: Question) -> None:
        assert self._sock is not None
        answer = FRAME.unpack(await receive_exactly(self._sock, FRAME.size))
        if answer != (question.sequence, 0, question.num_bytes):
            raise ValueError("the owner's answer is not to our question")
        copies, destination = question.copies, question.pull.destination
        if question.num_bytes >= len(copies) * LONG_BYTES:
            views = [destination[to : to + length] for _, to, length in copies.tolist()]
            await receive_views(self._sock, views)
            return
        packed = self._scratch.view(question.num_bytes)
        await receive_views(self._sock, [packed])
        self._copy(packed, destination, np.column_stack([pack(copies[:, 2]), copies[:, 1:]]))

    def _expire(self, pull: Pull) -> None:
        """What was asked for is on its way and has no other place to go, so its connection ends with it."""
        super()._expire(pull)
        if pull.asked:
            self._lose(f"tcp to {self.peer_id}: the owner did not answer within a pull's deadline")

    def _release(self) -> None:
        if self._sock is not None:
            self._sock.close()


async def _receive_request(sock: socket.socket, header: bytes, pool_bytes: int) -> tuple[int, Copies]:
    """The sequence number and the ranges, [n, 2] of offset and length. Raises ValueError for what may not be asked."""
    sequence, count, num_bytes = FRAME.unpack(header)
    if count > MAX_RANGES or num_bytes > MAX_ANSWER_BYTES:
        raise ValueError(f"asked for {num_bytes} bytes in {count} ranges at once")
    ranges = np.frombuffer(await receive_exactly(sock, count * RANGE_BYTES), "<i8").reshape(-1, 2).astype(np.int64)
    check(np.insert(ranges, 1, 0, axis=1), pool_bytes, num_bytes)
    if ranges[:, 1].sum() != num_bytes:
        raise ValueError(f"asked for {num_bytes} bytes and named {ranges[:, 1].sum()}")
    return sequence, ranges


def _parse_address(address: dict[str, str | int]) -> tuple[str, int]:
    """Numbers only: a name would be looked up by a thread that has no deadline. Raises ValueError."""
    port = address.get("port")
    if not isinstance(port, int) or not 0 < port < 65536:
        raise ValueError(f"{port!r} is no port")
    return str(ipaddress.ip_address(address.get("host", ""))), port


def _tune(sock: socket.socket) -> None:
    """The kernel sizes the buffers by itself, beyond what SO_SNDBUF would be allowed."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_COUNT)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, USER_TIMEOUT_MS)
