"""Who may call what: user keys open /v1, the cluster key opens everything."""

from __future__ import annotations

import hmac
from collections.abc import Iterable

from aiohttp import web
from aiohttp.typedefs import Handler

from engine.api.errors import Forbidden, Unauthorized
from engine.config import EngineSettings
from engine.server.service import SERVICE

USER_ROUTES = ("/v1/",)
CLUSTER_ROUTES = ("/distserve/", "/terminate")


@web.middleware
async def authenticate(request: web.Request, handler: Handler) -> web.StreamResponse:
    settings = request.app[SERVICE].settings
    token = _bearer(request)
    if request.path.startswith(CLUSTER_ROUTES):
        _require(token, _cluster_keys(settings), "The cluster key is needed here")
    elif request.path.startswith(USER_ROUTES) and settings.api_key:
        _require(token, [*_user_keys(settings), *_cluster_keys(settings)], "An API key is needed here")
    return await handler(request)


def require_cluster_key(request: web.Request) -> None:
    """For hand-offs inside user routes. Open when no cluster key is configured. Raises Forbidden."""
    keys = _cluster_keys(request.app[SERVICE].settings)
    if keys and not _is_one_of(_bearer(request), keys):
        raise Forbidden("Only the holder of the cluster key may ask for a hand-off")


def _bearer(request: web.Request) -> bytes:
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    return token.strip().encode("utf-8", "surrogateescape") if scheme.lower() == "bearer" else b""


def _user_keys(settings: EngineSettings) -> list[bytes]:
    return [key.get_secret_value().encode() for key in settings.api_key]


def _cluster_keys(settings: EngineSettings) -> list[bytes]:
    return [settings.cluster_key.get_secret_value().encode()] if settings.cluster_key else []


def _require(token: bytes, keys: list[bytes], message: str) -> None:
    if keys and not _is_one_of(token, keys):
        raise Unauthorized(f"{message}: send it as 'Authorization: Bearer …'", code="invalid_api_key")


def _is_one_of(token: bytes, keys: Iterable[bytes]) -> bool:
    # Every key is compared, in constant time: how long it takes says nothing.
    return sum(hmac.compare_digest(token, key) for key in keys) > 0
