"""Around every handler: keys, the count of requests, and the one place where errors turn into replies."""

from __future__ import annotations

import asyncio
import logging

import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler

from engine.api.errors import (
    InvalidRequest,
    Overloaded,
    TandemError,
    Unauthorized,
    flat_body,
    openai_body,
)
from engine.api.refusal import refusal
from proxy.keys import CLUSTER_ROUTES
from proxy.relay import ABANDONED
from proxy.service import SERVICE

log = logging.getLogger("proxy")

CLIENT_LEFT = 499


@web.middleware
async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
    """A cancelled handler is a client that has left."""
    service = request.app[SERVICE]
    status = CLIENT_LEFT
    try:
        service.keys.check(request)
        response = await handler(request)
        status = request.get("status", response.status)
        return response
    except asyncio.CancelledError:
        service.metrics.client_disconnects += 1
        raise
    except ConnectionError:
        service.metrics.client_disconnects += 1
        return ABANDONED
    except Exception as exception:
        error = _as_error(request, exception)
        status = error.status
        return _reply(request, error)
    finally:
        service.metrics.requests[_route(request), status] += 1


def _as_error(request: web.Request, exception: Exception) -> TandemError:
    match exception:
        case TandemError():
            return exception
        case web.HTTPException() if exception.status < 500:
            return refusal(request, exception)
        case web.RequestPayloadError():
            return InvalidRequest("The body cannot be read")
        case _:
            log.error("%s %s failed", request.method, request.path, exc_info=exception)
            return TandemError("Internal error; the proxy's log says more")


def _reply(request: web.Request, error: TandemError) -> web.Response:
    body = flat_body(error) if request.path.startswith(CLUSTER_ROUTES) else openai_body(error)
    headers = {}
    if isinstance(error, Overloaded):
        headers["Retry-After"] = str(error.retry_after_s)
    if isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    return web.Response(
        status=error.status, body=msgspec.json.encode(body), content_type="application/json", headers=headers
    )


def _route(request: web.Request) -> str:
    """The route's pattern; never what a stranger typed."""
    resource = request.match_info.route.resource
    return resource.canonical if resource is not None else "unknown"
