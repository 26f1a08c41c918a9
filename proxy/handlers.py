"""The user's routes: completions, shared between engines where that can be, and whatever else engines offer."""

from __future__ import annotations

import asyncio
import time

import msgspec
from aiohttp import web

from engine.api.distserve import HANDOFF_HEADER
from engine.api.errors import BodyTimeout, InvalidRequest, NotFound, TooLarge
from proxy.exchange import Exchange
from proxy.http1 import HOP_BY_HOP
from proxy.relay import BufferedReply, Outcome, give, relay, until_taken
from proxy.requests import Call, read_shape
from proxy.service import SERVICE, Service

_STARTED_AT = int(time.time())  # what /v1/models calls the models' creation

# Not for engines: what concerns this connection, what is written anew, and what only we may say.
_KEPT_BACK = HOP_BY_HOP | {
    *(b"host", b"content-length", b"content-encoding", b"accept-encoding", b"expect", b"cookie"),
    HANDOFF_HEADER.lower().encode(),
}


async def complete(request: web.Request) -> web.StreamResponse:
    """/v1/chat/completions and /v1/completions."""
    return await _answer(request, shared=True)


async def forward(request: web.Request) -> web.StreamResponse:
    """Any other route of an engine: one engine answers the whole of it."""
    return await _answer(request, shared=False)


async def list_models(request: web.Request) -> web.Response:
    service = request.app[SERVICE]
    return _json({"object": "list", "data": [_model(name) for name in service.nodes.models]})


async def get_model(request: web.Request) -> web.Response:
    name = request.match_info["model"]
    if name not in request.app[SERVICE].nodes.models:
        raise NotFound(f"The model {name!r} does not exist", param="model", code="model_not_found")
    return _json(_model(name))


async def _answer(request: web.Request, shared: bool) -> web.StreamResponse:
    service = request.app[SERVICE]
    arrived = time.monotonic()
    async with service.admission:
        body = await _read_body(request, service.settings.max_body_bytes, service.settings.body_timeout)
        call = Call(request.path, _passed_headers(request, service), body, shared, read_shape(body))

        async def deliver(answer: Exchange | BufferedReply) -> Outcome:
            if isinstance(answer, BufferedReply):
                return give(request, answer)
            service.metrics.first_byte(answer.first_byte_at - arrived if answer.first_byte_at else 0.0)
            return await relay(request, answer, service.metrics, service.settings.idle_timeout)

        outcome = await service.dispatcher.answer(call, deliver)
    request["status"] = outcome.status
    await until_taken(request, service.settings.idle_timeout)  # the next answer of this connection comes after it
    return outcome.response


async def _read_body(request: web.Request, limit: int, patience_s: float) -> bytes:
    """Raises TooLarge, BodyTimeout, InvalidRequest."""
    if (request.content_length or 0) > limit:
        raise TooLarge(f"The body is longer than {limit} bytes")
    try:
        if request.content.is_eof():
            return await request.read()
        async with asyncio.timeout(patience_s):
            return await request.read()
    except TimeoutError:
        raise BodyTimeout(f"The body was not complete within {patience_s:g} s") from None
    except web.HTTPRequestEntityTooLarge:
        raise TooLarge(f"The body is longer than {limit} bytes") from None
    except web.RequestPayloadError as error:
        raise InvalidRequest(f"The body cannot be read: {error}") from None


def _passed_headers(request: web.Request, service: Service) -> bytes:
    """The client's own headers, as lines. With a cluster key that takes the place of the client's key."""
    key_line = service.key_line
    lines = [key_line]
    for name, value in request.raw_headers:
        lower = name.lower()
        if lower not in _KEPT_BACK and not (key_line and lower == b"authorization"):
            lines.append(b"%b: %b\r\n" % (name, value))
    return b"".join(lines)


def _model(name: str) -> dict[str, object]:
    return {"id": name, "object": "model", "created": _STARTED_AT, "owned_by": "tandem", "root": name, "parent": None}


def _json(value: object) -> web.Response:
    return web.Response(body=msgspec.json.encode(value), content_type="application/json")
