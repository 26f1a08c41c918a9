"""An engine from its settings to its exit: has the core load, opens the doors, drains, ends.

What takes long to import, and is not needed for the core to begin to load, is imported in a thread while it loads.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import socket
import ssl
import sys
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

import uvloop

from engine.api.errors import TandemError
from engine.api.settings import load
from engine.child import CoreChild
from engine.client import CoreClient
from engine.config import EngineSettings
from engine.models.resolve import resolve
from engine.observe import log as logs
from engine.server.address import reachable_url
from engine.server.port import CannotListen, bind, tls_context
from engine.server.shutdown import Shutdown, ShutdownRequested

if TYPE_CHECKING:
    from engine.server.doors import Doors

log = logging.getLogger("engine")

EXAMPLE = """
engine --model smollm2 --port 23333
engine --role prefill --model /models/qwen3 --proxy-url http://10.0.0.1:8000 --host 0.0.0.0
"""


class CannotStart(Exception):
    """The engine cannot start; the message is one line for the user."""


def run(argv: Sequence[str], core: CoreChild) -> int:
    """The exit code: 0 when asked to end, 1 when it could not start or its core died. Exits 2 when a setting is
    wrong."""
    settings = load(
        EngineSettings,
        argv,
        prog="engine",
        description="One engine of a cluster: reads prompts (prefill), writes answers (decode), or both (hybrid).",
        example=EXAMPLE,
    )
    logs.configure(settings.log_level)
    try:
        return _run(settings, core)
    except (CannotStart, CannotListen) as error:
        print(f"engine: error: {error}", file=sys.stderr)
        return 1


def _run(settings: EngineSettings, core: CoreChild) -> int:
    _check_model(settings)
    tls = tls_context(settings.ssl_certfile, settings.ssl_keyfile)
    with bind(settings.host, settings.port) as held:
        url = reachable_url("https" if tls else "http", settings.host, settings.port, settings.proxy_url)
        named = settings.model_copy(update={"advertise_url": settings.advertise_url or url})
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_serve(named, core, held, tls))


def _check_model(settings: EngineSettings) -> None:
    try:
        resolve(settings.model)
    except ValueError as error:
        raise CannotStart(f"--model: {error}") from None


async def _serve(settings: EngineSettings, core: CoreChild, held: socket.socket, tls: ssl.SSLContext | None) -> int:
    """From here on everything is undone in reverse order, however it ends."""
    shutdown = Shutdown()
    async with AsyncExitStack() as stack:
        try:
            async with shutdown.interrupts(settings.startup_timeout):
                client = await _start(settings, core, held, tls, stack)
        except ShutdownRequested:
            log.info("asked to end while starting")
            return 0
        except TimeoutError:
            raise CannotStart(f"not ready after {settings.startup_timeout:g} s; see --startup-timeout") from None
        except TandemError as error:
            raise CannotStart(error.message) from None
        return await _until_end(settings, shutdown, client)


async def _start(
    settings: EngineSettings, core: CoreChild, held: socket.socket, tls: ssl.SSLContext | None, stack: AsyncExitStack
) -> CoreClient:
    """The core and what the API needs load side by side; then this engine listens, and joins its proxy."""
    log.info("starting the core: %s as %s", settings.model, settings.role.name.lower())
    started = time.monotonic()
    loading = asyncio.create_task(asyncio.to_thread(_load_doors, settings))  # begins when the core has been told
    stack.callback(_forget, loading)
    client = await stack.enter_async_context(CoreClient.start(settings, core))
    log.info("core ready after %.1f s: %s", time.monotonic() - started, _summary(client))
    doors = await loading
    await stack.enter_async_context(doors.open(client, held, tls))
    gc.freeze()  # what is loaded stays: looking through it for garbage would hold every stream up for 30 ms
    log.info("listening on %s after %.1f s", settings.advertise_url, time.monotonic() - started)
    return client


def _load_doors(settings: EngineSettings) -> Doors:
    """Runs in a thread."""
    from engine.server.doors import Doors

    started = time.monotonic()
    try:
        doors = Doors(settings)
    except ValueError as error:
        raise CannotStart(f"--model {settings.model}: {error}") from None
    log.info("tokenizer ready after %.1f s", time.monotonic() - started)
    return doors


def _forget(loading: asyncio.Task[Doors]) -> None:
    """When the core could not start, the tokenizer's own failure is no news."""
    loading.cancel()
    loading.add_done_callback(lambda task: task.cancelled() or task.exception())


def _summary(client: CoreClient) -> str:
    model = client.model
    return (
        f"{model.name}, {model.num_parameters / 1e6:.0f}M parameters in {model.dtype} on {model.device}, loaded in "
        f"{model.load_seconds:.1f} s; {model.num_blocks} blocks of {model.block_size} tokens"
    )


async def _until_end(settings: EngineSettings, shutdown: Shutdown, client: CoreClient) -> int:
    """The exit code: 0 after a signal, 1 when the core has died."""
    ends = [asyncio.ensure_future(shutdown.requested.wait()), asyncio.ensure_future(client.ended())]
    try:
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for end in ends:
            end.cancel()
    if client.alive:
        log.info("draining, for %g s at most; a second signal ends it at once", settings.drain_timeout)
        return 0
    log.error("the core has died; every open request is told so")
    return 1
