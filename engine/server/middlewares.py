"""Around every handler: the request's id, its line in the log and the metrics, and the one place where errors turn into
replies."""

from __future__ import annotations

import logging
import re
import time
import uuid

import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler

from engine.api import sse
from engine.api.errors import (
    DeadlineExceeded,
    MethodNotAllowed,
    Overloaded,
    TandemError,
    Unauthorized,
    flat_body,
    openai_body,
)
from engine.api.refusal import refusal
from engine.server.service import REQUEST_ID, REQUEST_ID_HEADER, SERVICE, STREAM

log = logging.getLogger("engine.server")

VALID_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
FLAT_ROUTES = ("/distserve", "/nodes", "/terminate")


@web.middleware
async def observe(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Outermost. A cancelled handler is a client that went away."""
    given = request.headers.get(REQUEST_ID_HEADER, "")
    request[REQUEST_ID] = given if VALID_REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
    started, status = time.monotonic(), "disconnected"
    try:
        response = await handler(request)
        status = str(response.status)
        return response
    finally:
        seconds = time.monotonic() - started
        route = _route(request)
        request.app[SERVICE].metrics.request_ended(route, status, seconds)
        log.debug("%s %s %s %.1f ms %s", request.method, route, status, seconds * 1e3, request[REQUEST_ID])


async def add_request_id(request: web.Request, response: web.StreamResponse) -> None:
    """on_response_prepare: the last moment before a head is sent, of streams too."""
    if request_id := request.get(REQUEST_ID):  # aiohttp refuses some requests before any middleware sees them
        response.headers[REQUEST_ID_HEADER] = request_id


@web.middleware
async def reply_with_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Every exception becomes exactly one reply: a true status before the first byte, an SSE error event after it."""
    try:
        return await handler(request)
    except ConnectionError:  # the client went away while we wrote to it
        return request.get(STREAM) or web.Response(status=499)
    except Exception as exception:
        error = _as_error(request, exception)
        stream = request.get(STREAM)
        return _whole_reply(request, error) if stream is None else await _end_stream(request, stream, error)


def _as_error(request: web.Request, exception: Exception) -> TandemError:
    match exception:
        case TandemError():
            return exception
        case web.HTTPException() if exception.status < 500:
            return refusal(request, exception)
        case TimeoutError():
            return DeadlineExceeded("The request was not done before its deadline")
        case _:
            log.error("request %s failed", request[REQUEST_ID], exc_info=exception)
            return TandemError(f"Internal error; the log tells more under request id {request[REQUEST_ID]}")


def _whole_reply(request: web.Request, error: TandemError) -> web.Response:
    body = flat_body(error) if request.path.startswith(FLAT_ROUTES) else openai_body(error)
    return web.Response(
        status=error.status,
        body=msgspec.json.encode(body),
        content_type="application/json",
        headers=_error_headers(request, error),
    )


def _error_headers(request: web.Request, error: TandemError) -> dict[str, str]:
    match error:
        case Overloaded():
            return {"Retry-After": str(error.retry_after_s)}
        case Unauthorized():
            return {"WWW-Authenticate": "Bearer"}
        case MethodNotAllowed():
            match_info = request.match_info.http_exception
            allowed = match_info.allowed_methods if isinstance(match_info, web.HTTPMethodNotAllowed) else ()
            return {"Allow": ", ".join(sorted(allowed))}
        case _:
            return {}


async def _end_stream(request: web.Request, stream: web.StreamResponse, error: TandemError) -> web.StreamResponse:
    log.warning("request %s failed after its first byte: %s", request[REQUEST_ID], error.message)
    request.app[SERVICE].metrics.stream_failed(error.label)
    try:
        await stream.write(sse.error_event(error))
        await stream.write_eof()
    except ConnectionError:
        log.debug("request %s: its client went away before it could be told", request[REQUEST_ID])
    return stream


def _route(request: web.Request) -> str:
    """The route as declared, so that strangers' paths make no new metric labels."""
    resource = request.match_info.route.resource
    return resource.canonical if resource is not None else "unknown"
