"""Runs a job's sub-requests on the core and merges what they say. Closing a generator here aborts what it runs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import cast

from engine.api.errors import Unavailable
from engine.core import Delta, Request
from engine.server.choice import Choice, Piece
from engine.server.job import Job
from engine.server.service import Service

Batch = list[tuple[int, Piece]]  # sub-request index, what it added


def run(service: Service, job: Job) -> AsyncGenerator[Batch]:
    """Batches of what is there at once, until every choice is finished. Raises the first TandemError of any."""
    streams = [_pieces(service, *pair) for pair in zip(job.requests, job.choices, strict=True)]
    return _single(streams[0]) if len(streams) == 1 else _merged(streams)


async def _pieces(service: Service, request: Request, choice: Choice) -> AsyncGenerator[Piece]:
    last = time.monotonic()
    first = True
    deltas = cast("AsyncGenerator[Delta]", service.client.generate(request))
    async with aclosing(deltas):
        async for delta in deltas:
            piece = choice.feed(delta)
            now = time.monotonic()
            if piece.tokens:
                _measure(service, first, now - last, len(piece.tokens))
                first, last = False, now
            yield piece
            if piece.finish_reason is not None:
                return
    raise Unavailable("The engine core ended this request in silence")


def _measure(service: Service, first: bool, seconds: float, num_tokens: int) -> None:
    if first:
        service.metrics.first_token(seconds)
    else:
        service.metrics.next_tokens(seconds, num_tokens)


async def _single(stream: AsyncGenerator[Piece]) -> AsyncGenerator[Batch]:
    async with aclosing(stream):
        async for piece in stream:
            yield [(0, piece)]


class _Ended:
    """A forwarder's last word; its task tells how it went."""


Word = tuple[int, Piece | _Ended]


async def _merged(streams: Sequence[AsyncGenerator[Piece]]) -> AsyncGenerator[Batch]:
    """Each stream runs in a task of its own and waits until its piece has been taken, so the queue stays short."""
    words: asyncio.Queue[Word] = asyncio.Queue(maxsize=2 * len(streams))
    taken = [asyncio.Event() for _ in streams]
    tasks = [
        asyncio.create_task(_forward(i, stream, words, taken[i]), name=f"choice-{i}")
        for i, stream in enumerate(streams)
    ]
    try:
        running = len(tasks)
        while running:
            ready = await _drain(words)
            for index in (index for index, word in ready if isinstance(word, _Ended)):
                running -= 1
                await tasks[index]  # raises what ended it
            if batch := [(index, word) for index, word in ready if isinstance(word, Piece)]:
                yield batch
            for index, _ in ready:
                taken[index].set()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _forward(index: int, stream: AsyncGenerator[Piece], words: asyncio.Queue[Word], taken: asyncio.Event) -> None:
    try:
        async with aclosing(stream):
            async for piece in stream:
                words.put_nowait((index, piece))
                await taken.wait()
                taken.clear()
    finally:
        words.put_nowait((index, _Ended()))


async def _drain(words: asyncio.Queue[Word]) -> list[Word]:
    ready = [await words.get()]
    while not words.empty():
        ready.append(words.get_nowait())
    return ready
