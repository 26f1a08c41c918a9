"""Who may call what: user keys open the user routes, the cluster key opens everything; what has no keys is open."""

from __future__ import annotations

import hmac

from aiohttp import web

from engine.api.errors import Unauthorized
from proxy.config import ProxySettings

CLUSTER_ROUTES = ("/nodes/", "/distserve/")
OPEN_ROUTES = frozenset({"/", "/health", "/metrics", "/docs", "/openapi.json"})


class Keys:
    def __init__(self, settings: ProxySettings) -> None:
        self._cluster = [settings.cluster_key_text.encode()] if settings.cluster_key_text else []
        self._user = [key.get_secret_value().encode() for key in settings.api_key]

    def check(self, request: web.Request) -> None:
        """Raises Unauthorized."""
        path = request.path
        if path.startswith(CLUSTER_ROUTES):
            self._require(self._cluster, request, "the cluster key")
        elif self._user and path not in OPEN_ROUTES:
            self._require([*self._user, *self._cluster], request, "an API key")

    @staticmethod
    def _require(keys: list[bytes], request: web.Request, what: str) -> None:
        if not keys:
            return
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        shown = token.strip().encode("utf-8", "surrogateescape") if scheme.lower() == "bearer" else b""
        # Every key is compared, in constant time: how long it takes says nothing.
        if not sum(hmac.compare_digest(shown, key) for key in keys):
            raise Unauthorized(f"{request.path} needs {what}, as 'Authorization: Bearer …'", code="invalid_api_key")
