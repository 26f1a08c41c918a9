"""What a client meets: tokenizer, application, port, and this engine's place at its proxy."""

from __future__ import annotations

import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from engine.client import CoreClient
from engine.config import EngineSettings
from engine.server.app import create_app
from engine.server.listener import Listener
from engine.server.register import NodeStatus, Registration
from engine.text.tokenizer import Tokenizer


class Doors:
    def __init__(self, settings: EngineSettings) -> None:
        """Loads the tokenizer. Raises ValueError when the model has none that can be used."""
        self._settings = settings
        self._tokenizer = Tokenizer.load(settings.model, settings.chat_template)

    @asynccontextmanager
    async def open(self, client: CoreClient, held: socket.socket, tls: ssl.SSLContext | None) -> AsyncIterator[None]:
        """Listens on `held` and joins the proxy. Afterwards, in this order: no more heartbeats, what runs is drained,
        the engine leaves the proxy."""
        settings = self._settings
        listener = Listener(create_app(settings, client, self._tokenizer), settings.drain_timeout)
        async with AsyncExitStack() as membership, AsyncExitStack() as draining:
            draining.push_async_callback(listener.drain, client)
            await listener.start(held, tls)
            if settings.proxy_url:
                registration = await membership.enter_async_context(_registration(settings, settings.proxy_url, client))
                draining.push_async_callback(registration.fall_silent)
            yield


def _registration(settings: EngineSettings, proxy_url: str, client: CoreClient) -> Registration:
    status: NodeStatus = {
        "role": int(settings.role),
        "models": [client.model.name],
        "speed": None,
        "incarnation": client.incarnation,
    }
    key = settings.cluster_key.get_secret_value() if settings.cluster_key else None
    return Registration(proxy_url, settings.advertise_url or "", lambda: status, key, settings.heartbeat_seconds)
