"""Waiting on non-blocking sockets, and moving bytes between them and memory, from inside the event loop."""

from __future__ import annotations

import asyncio
import os
import socket
from collections import deque
from collections.abc import Callable
from typing import TypeVar

VIEWS_AT_ONCE = 64  # given to one system call
LOW_WATER_BYTES = 2 << 20  # a reader sleeps until so much has come, or all that is missing


T = TypeVar("T")


def settle(future: asyncio.Future[T], value: T) -> None:
    """Sets a result unless there is one, or nobody waits any more."""
    if not future.done():
        future.set_result(value)


async def readable(sock: socket.socket) -> None:
    """Returns when the socket has something to read, or an error."""
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    loop.add_reader(sock, settle, ready, None)
    try:
        await ready
    finally:
        loop.remove_reader(sock)


async def writable(sock: socket.socket) -> None:
    """Returns when the socket takes more, or has an error."""
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    loop.add_writer(sock, settle, ready, None)
    try:
        await ready
    finally:
        loop.remove_writer(sock)


async def receive_exactly(sock: socket.socket, num_bytes: int) -> bytes:
    """Raises EOFError when the peer closes first."""
    loop = asyncio.get_running_loop()
    buffer = bytearray(num_bytes)
    view = memoryview(buffer)
    while view:
        received = await loop.sock_recv_into(sock, view)
        if not received:
            raise EOFError("the peer closed the connection")
        view = view[received:]
    return bytes(buffer)


async def send_views(sock: socket.socket, views: list[memoryview]) -> None:
    """Sends all of them, gathered by the kernel: nothing is joined here. The list is used up."""
    loop = asyncio.get_running_loop()
    first = 0

    def step() -> bool:
        nonlocal first
        sent = sock.sendmsg(views[first : first + VIEWS_AT_ONCE])
        first = _advance(views, first, sent)
        return first == len(views)

    try:
        await _repeat(step, loop.add_writer, loop.remove_writer, sock)
    finally:
        views.clear()  # a cancelled task's traceback would keep the memory mapped


async def send_file(sock: socket.socket, fd: int, ranges: list[tuple[int, int]]) -> None:
    """Sends ranges of (offset, length) of a file without copying them: what is not yet received may still change."""
    loop = asyncio.get_running_loop()
    pending = deque(ranges)

    def step() -> bool:
        while pending:
            offset, length = pending[0]
            sent = os.sendfile(sock.fileno(), fd, offset, length)
            if sent < length:
                pending[0] = (offset + sent, length - sent)
            else:
                pending.popleft()
        return True

    await _repeat(step, loop.add_writer, loop.remove_writer, sock)


async def receive_views(sock: socket.socket, views: list[memoryview]) -> None:
    """Fills all of them, scattered by the kernel. The list is used up. Raises EOFError when the peer closes first."""
    loop = asyncio.get_running_loop()
    first, missing = 0, sum(map(len, views))

    def step() -> bool:
        nonlocal first, missing
        received = sock.recvmsg_into(views[first : first + VIEWS_AT_ONCE])[0]
        if not received:
            raise EOFError("the peer closed the connection")
        first = _advance(views, first, received)
        missing -= received
        if missing < LOW_WATER_BYTES:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, max(missing, 1))
        return not missing

    if not missing:
        return
    try:
        # Woken for every few packets, a reader spends more on waking than on copying.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, min(missing, LOW_WATER_BYTES))
        await _repeat(step, loop.add_reader, loop.remove_reader, sock)
    finally:
        views.clear()


async def _repeat(
    step: Callable[[], bool],
    watch: Callable[..., None],
    forget: Callable[[socket.socket], object],
    sock: socket.socket,
) -> None:
    """Takes one step now and one whenever the socket is ready, until a step says that it was the last."""
    finished = asyncio.get_running_loop().create_future()

    def ready() -> None:
        if finished.done():  # cancelled in this turn of the loop: no byte may move any more
            return
        try:
            if step():
                finished.set_result(None)
        except BlockingIOError:
            pass
        except (OSError, EOFError) as error:
            finished.set_exception(error)

    ready()
    watch(sock, ready)
    try:
        await finished
    finally:
        forget(sock)


def _advance(views: list[memoryview], first: int, num_bytes: int) -> int:
    """Takes `num_bytes` off the front of views[first:], and returns the first that has some left."""
    while num_bytes >= len(views[first]):
        num_bytes -= len(views[first])
        first += 1
        if first == len(views):
            return first
    views[first] = views[first][num_bytes:]
    return first
