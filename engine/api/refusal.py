"""What aiohttp refuses by itself, said in our words: no such route, wrong method, too large."""

from __future__ import annotations

from aiohttp import web

from engine.api.errors import InvalidRequest, MethodNotAllowed, NotFound, TandemError, TooLarge


def refusal(request: web.BaseRequest, exception: web.HTTPException) -> TandemError:
    """Of a 4xx that aiohttp raised before or instead of a handler."""
    match exception:
        case web.HTTPMethodNotAllowed():
            allowed = ", ".join(sorted(exception.allowed_methods))
            return MethodNotAllowed(f"{request.method} is not allowed on {request.path[:200]}; allowed: {allowed}")
        case web.HTTPNotFound():
            return NotFound(f"There is no route {request.path[:200]!r}; see /docs")
        case web.HTTPRequestEntityTooLarge():
            return TooLarge("The body is too large")
        case _:
            return InvalidRequest(exception.reason)
