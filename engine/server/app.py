"""The engine's HTTP application: all routes on one screen."""

from __future__ import annotations

from typing import Final

from aiohttp import web

from engine.client import CoreClient
from engine.config import EngineSettings
from engine.observe.metrics import EngineMetrics
from engine.server import admin, chat, completions, distserve, docs, protocol_log
from engine.server.keys import authenticate
from engine.server.middlewares import add_request_id, observe, reply_with_errors
from engine.server.service import SERVICE, Service, fingerprint
from engine.text.tokenizer import Tokenizer

ROUTES: Final = (
    web.post("/v1/chat/completions", chat.chat_completions),
    web.post("/v1/completions", completions.completions),
    web.get("/v1/models", admin.models),
    web.get("/v1/models/{model:.+}", admin.model),
    web.get("/distserve/engine_info", distserve.engine_info),
    web.post("/distserve/p2p_initialize", distserve.p2p_initialize),
    web.post("/distserve/p2p_connect", distserve.p2p_connect),
    web.post("/distserve/p2p_drop_connect", distserve.p2p_drop_connect),
    web.post("/distserve/free_cache", distserve.free_cache),
    web.get("/health", admin.health),
    web.get("/metrics", admin.metrics),
    web.get("/version", admin.show_version),
    web.get("/terminate", admin.terminate),  # LMDeploy's proxy asks with GET
    web.post("/terminate", admin.terminate),
    web.get("/docs", docs.docs),
    web.get("/openapi.json", docs.openapi),
)


def create_app(settings: EngineSettings, client: CoreClient, tokenizer: Tokenizer) -> web.Application:
    """Serve it with `handler_cancellation=True`: that is how a client that goes away ends its request."""
    app = web.Application(middlewares=[observe, reply_with_errors, authenticate])
    app[SERVICE] = Service(
        settings=settings,
        client=client,
        tokenizer=tokenizer,
        metrics=EngineMetrics(lambda: client.stats),
        fingerprint=fingerprint(client),
    )
    protocol_log.install()
    app.add_routes(ROUTES)
    app.on_response_prepare.append(add_request_id)
    return app
