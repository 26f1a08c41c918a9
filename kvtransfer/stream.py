"""Waiting on non-blocking sockets, and moving bytes between them and memory, from inside the event loop."""

from __future__ import annotations

import asyncio
import socket
from typing import TypeVar

VIEWS_AT_ONCE = 64  # given to one system call


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
    first = 0
    while first < len(views):
        try:
            sent = sock.sendmsg(views[first : first + VIEWS_AT_ONCE])
        except BlockingIOError:
            await writable(sock)
        else:
            first = _advance(views, first, sent)


async def receive_views(sock: socket.socket, views: list[memoryview]) -> None:
    """Fills all of them, scattered by the kernel. The list is used up. Raises EOFError when the peer closes first."""
    first = 0
    while first < len(views):
        try:
            received = sock.recvmsg_into(views[first : first + VIEWS_AT_ONCE])[0]
        except BlockingIOError:
            await readable(sock)
            continue
        if not received:
            raise EOFError("the peer closed the connection")
        first = _advance(views, first, received)


def _advance(views: list[memoryview], first: int, num_bytes: int) -> int:
    """Takes `num_bytes` off the front of views[first:], and returns the first that has some left."""
    while num_bytes >= len(views[first]):
        num_bytes -= len(views[first])
        first += 1
        if first == len(views):
            return first
    views[first] = views[first][num_bytes:]
    return first
