"""What the proxy shows to people: the status page, and the documentation made from its OpenAPI description."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Any

import msgspec
from aiohttp import web

from engine.api.distserve import FlatError, Node, Status, WarmupResponse

_SUMMARIES = {
    "/v1/chat/completions": "Answer a conversation (OpenAI); shared by a prefill and a decode engine",
    "/v1/completions": "Continue a prompt (OpenAI); shared by a prefill and a decode engine",
    "/v1/models": "The models that registered engines serve",
    "/v1/models/{model}": "One of them",
    "/nodes/add": "Register an engine; its heartbeat, too",
    "/nodes/remove": "Forget an engine",
    "/nodes/status": "What is known of every engine",
    "/nodes/terminate": "End an engine's process and forget it",
    "/nodes/terminate_all": "End all of them",
    "/nodes/overview": "What the status page shows",
    "/distserve/connection_warmup": "Connect every prefill-decode pair now",
    "/distserve/gc": "Free KV that no live request owns",
    "/health": "200 while the proxy lives; what it could serve",
    "/metrics": "Prometheus metrics",
    "/docs": "This documentation",
    "/openapi.json": "This documentation, for programs",
    "/": "Status page",
}
_BODIES: dict[str, type] = {"/nodes/add": Node, "/nodes/remove": Node, "/nodes/terminate": Node}
_REPLIES: dict[str, Any] = {
    "/nodes/status": dict[str, Status],
    "/distserve/connection_warmup": WarmupResponse,
    "/distserve/gc": WarmupResponse,
}


async def dashboard(request: web.Request) -> web.Response:
    return _page("dashboard.html")


async def docs(request: web.Request) -> web.Response:
    return _page("docs.html")


async def openapi(request: web.Request) -> web.Response:
    return web.json_response(describe(request.app))


def describe(app: web.Application) -> dict[str, Any]:
    """OpenAPI 3.1 of the routes that `app` has."""
    kinds = [*_BODIES.values(), *_REPLIES.values(), FlatError]
    schemas, components = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    schema_of = {repr(kind): schema for kind, schema in zip(kinds, schemas, strict=True)}
    paths: dict[str, dict[str, Any]] = {}
    for route in app.router.routes():
        if route.resource is not None and route.method != "HEAD":
            path = route.resource.canonical
            paths.setdefault(path, {})[route.method.lower()] = _operation(path, schema_of)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Tandem proxy", "version": "1"},
        "paths": paths,
        "components": {"schemas": components},
    }


def _operation(path: str, schema_of: dict[str, Any]) -> dict[str, Any]:
    summary = _SUMMARIES.get(path, "Passed on to one engine")
    operation: dict[str, Any] = {"summary": summary, "responses": {"200": {"description": "Done"}}}
    if path in _BODIES:
        schema = schema_of[repr(_BODIES[path])]
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    if path in _REPLIES:
        schema = schema_of[repr(_REPLIES[path])]
        operation["responses"]["200"]["content"] = {"application/json": {"schema": schema}}
    if path.startswith(("/nodes", "/distserve")):
        flat = {"application/json": {"schema": schema_of[repr(FlatError)]}}
        operation["responses"]["default"] = {"description": "Refused", "content": flat}
    return operation


def _page(name: str) -> web.Response:
    return web.Response(text=_text(name), content_type="text/html")


@cache
def _text(name: str) -> str:
    return files("proxy").joinpath("dashboard", name).read_text(encoding="utf-8")
