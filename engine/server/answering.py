"""Answers a job, whole or as a stream; what it looks like is the API's `Shape`."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import Any, Final, Protocol

import msgspec
from aiohttp import web

from engine.api import sse
from engine.api.answers import GivenAnswer, PromptDetails, Usage
from engine.server.choice import Piece
from engine.server.generation import Batch, run
from engine.server.job import Job
from engine.server.service import SERVICE, STREAM, Service

IGNORED_FIELDS_HEADER: Final = "X-Tandem-Ignored-Fields"
MAX_IGNORED_NAMES: Final = 32
MAX_NAME_CHARACTERS: Final = 64
WRITE_GRACE_S: Final = 5.0  # past the core's own deadline, for a client that reads slowly


class Shape(Protocol):
    """How one API writes its answers; every method returns structs that msgspec can encode."""

    def opening(self, index: int) -> Any | None:
        """The chunk before a choice's first, if this API has one."""

    def chunk(self, index: int, piece: Piece, usage: Usage | None) -> Any | None:
        """None when the piece has nothing to say yet."""

    def closing(self, usage: Usage) -> Any:
        """The chunk without choices that carries the usage."""

    def whole(self, pieces: list[Piece], usage: Usage) -> GivenAnswer: ...


async def answer(request: web.Request, job: Job, shape: Shape) -> web.StreamResponse:
    service = request.app[SERVICE]
    async with asyncio.timeout(service.settings.request_timeout + WRITE_GRACE_S):
        if job.streams:
            return await _stream(request, service, job, shape)
        return await _whole(service, job, shape)


async def _whole(service: Service, job: Job, shape: Shape) -> web.Response:
    pieces: list[list[Piece]] = [[] for _ in job.requests]
    async with aclosing(run(service, job)) as batches:
        async for batch in batches:
            for index, piece in batch:
                pieces[index].append(piece)
    body = shape.whole([Piece.joined(parts) for parts in pieces], _usage(job))
    if job.gives:
        body = _with_given(job, pieces, body)
    return web.Response(body=msgspec.json.encode(body), content_type="application/json", headers=_headers(job))


def _with_given(job: Job, pieces: list[list[Piece]], body: GivenAnswer) -> GivenAnswer:
    """The lease's name, its blocks and the first tokens, for LMDeploy's proxy to carry to decode."""
    assert job.handoff is not None
    return msgspec.structs.replace(
        body,
        id=str(job.handoff.session),  # LMDeploy's proxy reads it with int()
        cache_block_ids=[block for choice in job.choices for block in choice.block_ids],
        remote_token_ids=[token for parts in pieces for piece in parts for token in piece.tokens],
    )


async def _stream(request: web.Request, service: Service, job: Job, shape: Shape) -> web.StreamResponse:
    stream = web.StreamResponse(headers=_stream_headers(job))
    opened: set[int] = set()
    async with aclosing(run(service, job)) as batches:
        async for batch in batches:
            if not stream.prepared:  # only now: an early failure keeps its true status
                await stream.prepare(request)
                request[STREAM] = stream
            if events := _events(job, shape, batch, opened):
                await stream.write(events)
    await stream.write(_ending(job, shape))
    await stream.write_eof()
    return stream


def _events(job: Job, shape: Shape, batch: Batch, opened: set[int]) -> bytes:
    """All that one batch says, for one write."""
    options = job.fields.stream_options
    usage = _usage(job) if options and options.continuous_usage_stats else None
    chunks = []
    for index, piece in batch:
        if index not in opened:
            opened.add(index)
            chunks.append(shape.opening(index))
        chunks.append(shape.chunk(index, piece, usage))
    return b"".join(sse.event(chunk) for chunk in chunks if chunk is not None)


def _ending(job: Job, shape: Shape) -> bytes:
    options = job.fields.stream_options
    usage = sse.event(shape.closing(_usage(job))) if options and options.include_usage else b""
    return usage + sse.DONE


def _usage(job: Job) -> Usage:
    """A prompt counts once, however many choices were asked of it."""
    prompt_tokens = sum(map(len, job.prompts))
    completion_tokens = sum(choice.num_tokens for choice in job.choices)
    cached_tokens = sum(choice.cached_tokens for choice in job.choices[:: job.num_choices])
    return Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=prompt_tokens + completion_tokens,
        prompt_tokens_details=PromptDetails(cached_tokens),
    )


def _stream_headers(job: Job) -> dict[str, str]:
    return _headers(job) | {
        "Content-Type": sse.CONTENT_TYPE + "; charset=utf-8",
        "Cache-Control": "no-cache",
        "X-Accel-Buffering": "no",
    }


def _headers(job: Job) -> dict[str, str]:
    """The unknown fields' names come from a stranger: only what is safe in a header is repeated."""
    names = [name for name in job.ignored_fields if len(name) <= MAX_NAME_CHARACTERS and _is_plain(name)]
    return {IGNORED_FIELDS_HEADER: ", ".join(names[:MAX_IGNORED_NAMES]) or "?"} if job.ignored_fields else {}


def _is_plain(name: str) -> bool:
    return name.isascii() and name.replace("_", "").replace("-", "").replace(".", "").isalnum()
