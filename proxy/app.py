"""All routes of the proxy, on one screen."""

from __future__ import annotations

from collections.abc import AsyncIterator

from aiohttp import web

from proxy import cluster, handlers, pages
from proxy.config import ProxySettings
from proxy.middlewares import guard
from proxy.service import SERVICE, serving

# Offered by engines, answered by one of them; which of these an engine knows is its own business.
FORWARDED = (
    "/generate",
    "/v1/encode",
    "/tokenize",
    "/detokenize",
    "/v1/embeddings",
    "/pooling",
    "/score",
    "/v1/score",
    "/rerank",
    "/v1/rerank",
    "/v2/rerank",
    "/v1/sample",
    "/v1/responses",
    "/v1/messages",
)


def make_app(settings: ProxySettings) -> web.Application:
    app = web.Application(client_max_size=settings.max_body_bytes, middlewares=[guard])
    app.add_routes(
        [
            web.post("/v1/chat/completions", handlers.complete),
            web.post("/v1/completions", handlers.complete),
            web.get("/v1/models", handlers.list_models),
            web.get("/v1/models/{model:.+}", handlers.get_model),
            *(web.post(path, handlers.forward) for path in FORWARDED),
            #
            web.post("/nodes/add", cluster.add),
            web.post("/nodes/remove", cluster.remove),
            web.get("/nodes/status", cluster.status),
            web.post("/nodes/terminate", cluster.terminate),
            web.get("/nodes/terminate_all", cluster.terminate_all),
            web.get("/nodes/overview", cluster.overview),
            web.post("/distserve/connection_warmup", cluster.warm_up),
            web.post("/distserve/gc", cluster.collect),
            #
            web.get("/health", cluster.health),
            web.get("/metrics", cluster.metrics),
            web.get("/docs", pages.docs),
            web.get("/openapi.json", pages.openapi),
            web.get("/", pages.dashboard),
        ]
    )

    async def service(app: web.Application) -> AsyncIterator[None]:
        async with serving(settings) as app[SERVICE]:
            yield

    app.cleanup_ctx.append(service)
    return app
