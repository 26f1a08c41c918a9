"""The engine's port: listened on when there is somebody to answer, drained at the end."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
import time

from aiohttp import web

from engine.client import CoreClient
from engine.server.port import refused

log = logging.getLogger("engine")

BACKLOG = 1024
KEEPALIVE_S = 75.0  # for the next request's head to be whole: longer than proxies keep connections idle
LINGERING_S = 1.0  # how long the rest of a refused body is still read, so that its client sees the answer
FLUSH_S = 2.0  # for the last errors to reach their clients
LEASE_CHECK_S = 0.1


class Listener:
    """Serves one application on a held socket."""

    def __init__(self, app: web.Application, drain_timeout: float) -> None:
        self._drain_timeout = drain_timeout
        self._runner = web.AppRunner(
            app,
            access_log=None,
            handler_cancellation=True,  # a client that goes away frees its request everywhere
            shutdown_timeout=drain_timeout + FLUSH_S,
            lingering_time=LINGERING_S,
            keepalive_timeout=KEEPALIVE_S,
        )

    async def start(self, held: socket.socket, tls: ssl.SSLContext | None) -> None:
        """Raises CannotListen when another took the port between `bind` and now."""
        await self._runner.setup()
        try:
            await web.SockSite(self._runner, held, ssl_context=tls, backlog=BACKLOG).start()
        except OSError as error:
            raise refused("the port, which was free a moment ago", error) from None

    async def drain(self, client: CoreClient) -> None:
        """Accepts nothing new; requests under way, then leases that a reader still needs, get until the deadline.
        Requests that have not ended by then are told so."""
        deadline = time.monotonic() + (self._drain_timeout if client.alive else 0)
        cleanup = asyncio.create_task(self._runner.cleanup())
        if not await _ends(cleanup, deadline):
            if client.alive:
                log.warning("%d requests had not ended after %g s", client.num_open, self._drain_timeout)
                client.fail_open_requests("the engine was shut down before this request was done")
            await _ends(cleanup, time.monotonic() + FLUSH_S)
            cleanup.cancel()
        await _leases_end(client, deadline)


async def _ends(task: asyncio.Task[None], deadline: float) -> bool:
    done, _ = await asyncio.wait({task}, timeout=max(0.0, deadline - time.monotonic()))
    return bool(done)


async def _leases_end(client: CoreClient, deadline: float) -> None:
    def held() -> bool:
        return client.alive and client.stats is not None and client.stats.num_handoff > 0

    while held() and time.monotonic() < deadline:  # noqa: ASYNC110, the core reports about once a second
        await asyncio.sleep(LEASE_CHECK_S)
