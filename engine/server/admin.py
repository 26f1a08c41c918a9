"""Health, models, metrics, version, the end."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any, Final

import msgspec
from aiohttp import web

from engine.api.answers import ModelCard, ModelList
from engine.api.errors import Forbidden, Unavailable
from engine.observe.metrics import CONTENT_TYPE
from engine.server.service import SERVICE, Service, version

TERMINATE_DELAY_S: Final = 0.1  # for the reply to leave first
MAX_SILENCE_S: Final = 30.0  # of the core; no step of a working engine takes so long


async def health(request: web.Request) -> web.Response:
    client = request.app[SERVICE].client
    if not client.alive:
        raise Unavailable("The engine core has died")
    if client.silent_s > MAX_SILENCE_S:
        raise Unavailable(f"The engine core has said nothing for {client.silent_s:.0f} s: it hangs")
    return _json({"status": "ok"})


async def models(request: web.Request) -> web.Response:
    return _json(ModelList(data=[_card(request.app[SERVICE])]))


async def model(request: web.Request) -> web.Response:
    service = request.app[SERVICE]
    service.check_model(request.match_info["model"])
    return _json(_card(service))


async def metrics(request: web.Request) -> web.Response:
    return web.Response(body=request.app[SERVICE].metrics.exposition(), headers={"Content-Type": CONTENT_TYPE})


async def show_version(request: web.Request) -> web.Response:
    return _json({"version": version()})


async def terminate(request: web.Request) -> web.Response:
    """Ends this process as SIGTERM does: what runs may finish, then it exits 0."""
    if not request.app[SERVICE].settings.allow_terminate:
        raise Forbidden("This engine was not started with --allow-terminate")
    asyncio.get_running_loop().call_later(TERMINATE_DELAY_S, os.kill, os.getpid(), signal.SIGTERM)
    return _json({"status": "terminating"})


def _card(service: Service) -> ModelCard:
    return ModelCard(
        id=service.model_name,
        created=service.created,
        root=service.client.model.name,
        max_model_len=service.client.model.max_model_len,
    )


def _json(message: Any) -> web.Response:
    return web.Response(body=msgspec.json.encode(message), content_type="application/json")
