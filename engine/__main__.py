"""`engine`: one engine process of a cluster. Reads its settings, starts the core, listens, registers, drains, ends.

    settings ─▶ port and model checked ─▶ core spawned ═ loads the model ═╗
                                                └─▶ tokenizer loaded ═════╩═▶ listens ─▶ registers … drains ─▶ exit

Exits 0 when asked to end, 1 when the engine could not start or its core died, 2 when its settings are wrong. Nothing
heavy is imported here before the core has been spawned: the two processes load side by side.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

import uvloop
from aiohttp import web

from engine.api.errors import TandemError
from engine.api.settings import load
from engine.client import CoreClient
from engine.config import EngineSettings
from engine.models.resolve import ModelNotFound, resolve
from engine.observe import log as logs
from engine.server.register import NodeStatus, Registration, reachable_url
from engine.server.shutdown import Shutdown, ShutdownRequested

if TYPE_CHECKING:
    from engine.text.tokenizer import Tokenizer

log = logging.getLogger("engine")

BACKLOG = 1024
LEASE_CHECK_S = 0.1
FLUSH_S = 2.0  # for the last errors to reach their clients once the core has died

CreateApp = Callable[[EngineSettings, CoreClient, "Tokenizer"], web.Application]

EXAMPLE = """
engine --model smollm2 --port 23333
engine --role prefill --model /models/qwen3 --proxy-url http://10.0.0.1:8000 --host 0.0.0.0
"""


class CannotStart(Exception):
    """The engine cannot start; the message is one line for the user."""


def main(argv: Sequence[str] | None = None) -> None:
    settings = load(
        EngineSettings,
        sys.argv[1:] if argv is None else argv,
        prog="engine",
        description="One engine of a cluster: reads prompts (prefill), writes answers (decode), or both (hybrid).",
        example=EXAMPLE,
    )
    logs.configure(settings.log_level)
    try:
        sys.exit(_run(settings))
    except CannotStart as error:
        print(f"engine: error: {error}", file=sys.stderr)
        sys.exit(1)


def _run(settings: EngineSettings) -> int:
    _check_model(settings)
    tls = _tls(settings)
    with _bind(settings.host, settings.port) as listener:
        url = reachable_url("https" if tls else "http", settings.host, settings.port, settings.proxy_url)
        named = settings.model_copy(update={"advertise_url": settings.advertise_url or url})
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_serve(named, listener, tls))


def _check_model(settings: EngineSettings) -> None:
    try:
        resolve(settings.model)
    except ModelNotFound as error:
        raise CannotStart(f"--model: {error}") from None


def _tls(settings: EngineSettings) -> ssl.SSLContext | None:
    if settings.ssl_certfile is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(settings.ssl_certfile, settings.ssl_keyfile)
    except OSError as error:  # ssl.SSLError is one
        raise CannotStart(f"--ssl-certfile {settings.ssl_certfile}: {error}") from None
    return context


def _bind(host: str, port: int) -> socket.socket:
    """Holds the port from now on; listening starts when there is somebody to answer."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a restart must not wait for TIME_WAIT to pass
        listener.bind(address)
    except OSError as error:
        raise CannotStart(_cannot_listen(host, port, error)) from None
    return listener


def _cannot_listen(host: str, port: int, error: OSError) -> str:
    reason = (error.strerror or str(error)).lower()
    return f"cannot listen on {host} port {port}: {reason}; choose another with --host and --port"


async def _serve(settings: EngineSettings, listener: socket.socket, tls: ssl.SSLContext | None) -> int:
    """From here on everything is undone in reverse order, however it ends."""
    shutdown = Shutdown()
    async with AsyncExitStack() as stack:
        try:
            async with shutdown.interrupts(settings.startup_timeout):
                client = await _start(settings, listener, tls, stack)
        except ShutdownRequested:
            log.info("asked to end while starting")
            return 0
        except TimeoutError:
            raise CannotStart(f"not ready after {settings.startup_timeout:g} s; see --startup-timeout") from None
        except TandemError as error:
            raise CannotStart(error.message) from None
        async with AsyncExitStack() as membership:
            await _join(settings, client, membership)
            await _until_end(settings, shutdown, client)
        return 0 if client.alive else 1


async def _start(
    settings: EngineSettings, listener: socket.socket, tls: ssl.SSLContext | None, stack: AsyncExitStack
) -> CoreClient:
    """The core and what the API needs load side by side; then this engine listens."""
    log.info("starting the core: %s as %s", settings.model, settings.role.name.lower())
    started = time.monotonic()
    loading = asyncio.create_task(asyncio.to_thread(_load_api, settings))  # begins when the core has been spawned
    stack.callback(loading.cancel)
    client = await stack.enter_async_context(CoreClient.start(settings))
    log.info("core ready after %.1f s: %s", time.monotonic() - started, _summary(client))
    create_app, tokenizer = await loading
    runner = web.AppRunner(
        create_app(settings, client, tokenizer),
        access_log=None,
        handler_cancellation=True,  # a client that goes away frees its request everywhere
        shutdown_timeout=settings.drain_timeout,
    )
    await runner.setup()
    stack.push_async_callback(_drain, settings, client, runner)
    await _listen(settings, listener, tls, runner)
    log.info("listening on %s after %.1f s", settings.advertise_url, time.monotonic() - started)
    return client


def _load_api(settings: EngineSettings) -> tuple[CreateApp, Tokenizer]:
    """Runs in a thread. The imports stand here because they take seconds that the core's start must not wait for."""
    from engine.server.app import create_app
    from engine.text.tokenizer import Tokenizer

    started = time.monotonic()
    try:
        tokenizer = Tokenizer.load(settings.model, settings.chat_template)
    except ValueError as error:
        raise CannotStart(f"--model {settings.model}: {error}") from None
    log.info("tokenizer ready after %.1f s", time.monotonic() - started)
    return create_app, tokenizer


def _summary(client: CoreClient) -> str:
    model = client.model
    return (
        f"{model.name}, {model.num_parameters / 1e6:.0f}M parameters in {model.dtype} on {model.device}, loaded in "
        f"{model.load_seconds:.1f} s; {model.num_blocks} blocks of {model.block_size} tokens"
    )


async def _listen(
    settings: EngineSettings, listener: socket.socket, tls: ssl.SSLContext | None, runner: web.AppRunner
) -> None:
    try:
        await web.SockSite(runner, listener, ssl_context=tls, backlog=BACKLOG).start()
    except OSError as error:  # another took the port between our bind and now
        raise CannotStart(_cannot_listen(settings.host, settings.port, error)) from None


async def _join(settings: EngineSettings, client: CoreClient, membership: AsyncExitStack) -> None:
    if settings.proxy_url is None:
        return
    status: NodeStatus = {
        "role": int(settings.role),
        "models": [client.model.name],
        "speed": None,
        "incarnation": client.incarnation,
    }
    key = settings.cluster_key.get_secret_value() if settings.cluster_key else None
    url = settings.advertise_url or ""
    await membership.enter_async_context(
        Registration(settings.proxy_url, url, lambda: status, key, settings.heartbeat_seconds)
    )


async def _until_end(settings: EngineSettings, shutdown: Shutdown, client: CoreClient) -> None:
    ends = [asyncio.ensure_future(shutdown.requested.wait()), asyncio.ensure_future(client.ended())]
    try:
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for end in ends:
            end.cancel()
    if client.alive:
        log.info("draining, for %g s at most; a second signal ends it at once", settings.drain_timeout)
    else:
        log.error("the core has died; every open request is told so")


async def _drain(settings: EngineSettings, client: CoreClient, runner: web.AppRunner) -> None:
    """Stops accepting; requests under way, then leases that a reader still needs, get until the deadline."""
    deadline_s = settings.drain_timeout if client.alive else min(FLUSH_S, settings.drain_timeout)
    try:
        async with asyncio.timeout(deadline_s + FLUSH_S):
            await runner.cleanup()
            while client.alive and client.stats is not None and client.stats.num_handoff:  # noqa: ASYNC110, stats is polled
                await asyncio.sleep(LEASE_CHECK_S)
    except TimeoutError:
        log.warning("some requests had not ended %.0f s after the drain began", deadline_s)


if __name__ == "__main__":
    main()
