"""/openapi.json, made from the types that decode requests, and /docs, one page that needs nothing from elsewhere."""

from __future__ import annotations

import html
from typing import Any, Final, NamedTuple

import msgspec
from aiohttp import web

from engine.api import answers, distserve, openai
from engine.server.service import version


class Operation(NamedTuple):
    method: str
    path: str
    summary: str
    request: Any = None  # the body's type
    reply: Any = None


OPERATIONS: Final = (
    Operation("post", "/v1/chat/completions", "Answer a conversation", openai.ChatRequest, answers.ChatCompletion),
    Operation("post", "/v1/completions", "Continue a text", openai.CompletionRequest, answers.Completion),
    Operation("get", "/v1/models", "What is served here", reply=answers.ModelList),
    Operation("get", "/distserve/engine_info", "Block size and pool, as JSON in a string", reply=str),
    Operation(
        "post",
        "/distserve/p2p_initialize",
        "Get ready to be linked with a peer",
        distserve.InitializeRequest,
        distserve.InitializeResponse,
    ),
    Operation(
        "post", "/distserve/p2p_connect", "Link with a peer", distserve.ConnectRequest, distserve.ConnectResponse
    ),
    Operation(
        "post",
        "/distserve/p2p_drop_connect",
        "Undo a link",
        distserve.DropConnectRequest,
        distserve.DropConnectResponse,
    ),
    Operation("post", "/distserve/free_cache", "End a lease", distserve.FreeCacheRequest, distserve.FreeCacheResponse),
    Operation("get", "/health", "200 while the engine core lives, else 503"),
    Operation("get", "/metrics", "Prometheus' text format"),
    Operation("get", "/version", "The version of this engine"),
    Operation("post", "/terminate", "End this engine, where --allow-terminate allows it"),
)


async def openapi(request: web.Request) -> web.Response:
    return web.Response(body=msgspec.json.encode(specification()), content_type="application/json")


async def docs(request: web.Request) -> web.Response:
    return web.Response(text=page(specification()), content_type="text/html")


def specification() -> dict[str, Any]:
    kinds = [kind for operation in OPERATIONS for kind in (operation.request, operation.reply) if kind is not None]
    schemas, components = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    named = iter(schemas)
    paths: dict[str, Any] = {}
    for operation in OPERATIONS:
        described: dict[str, Any] = {"summary": operation.summary, "responses": {"200": {"description": "Success"}}}
        if operation.request is not None:
            described["requestBody"] = {"required": True, **_content(next(named))}
        if operation.reply is not None:
            described["responses"]["200"] |= _content(next(named))
        paths.setdefault(operation.path, {})[operation.method] = described
    return {
        "openapi": "3.1.0",
        "info": {"title": "Tandem engine", "version": version()},
        "paths": paths,
        "components": {"schemas": components},
    }


def _content(schema: dict[str, Any]) -> dict[str, Any]:
    return {"content": {"application/json": {"schema": schema}}}


STYLE: Final = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem }
code, pre { font: 14px/1.4 ui-monospace, monospace }
summary { cursor: pointer; padding: .3rem 0 } pre { background: #8881; padding: .6rem; overflow: auto }
b { display: inline-block; min-width: 3.5rem; text-transform: uppercase } :root { color-scheme: light dark }
"""


def page(described: dict[str, Any]) -> str:
    routes = "\n".join(
        _section(f"<b>{method}</b> <code>{html.escape(path)}</code> — {html.escape(operation['summary'])}", operation)
        for path, methods in described["paths"].items()
        for method, operation in methods.items()
    )
    types = "\n".join(
        _section(f"<code>{html.escape(name)}</code>", schema)
        for name, schema in sorted(described["components"]["schemas"].items())
    )
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>Tandem engine</title><style>{STYLE}</style>"
        f"<h1>Tandem engine</h1><p>Machine-readable: <a href=/openapi.json>/openapi.json</a></p>"
        f"<h2>Routes</h2>{routes}<h2>Types</h2>{types}</html>"
    )


def _section(title: str, content: Any) -> str:
    pretty = msgspec.json.format(msgspec.json.encode(content), indent=2).decode()
    return f"<details><summary>{title}</summary><pre>{html.escape(pretty)}</pre></details>"
