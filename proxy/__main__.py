"""`proxy`: one address for a cluster of engines."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import ssl
import sys

import uvloop
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from engine.api.settings import load
from engine.observe.log import configure
from proxy.app import make_app
from proxy.config import ProxySettings

log = logging.getLogger("proxy")
http_log = logging.getLogger("proxy.http")  # aiohttp's own

DESCRIPTION = """\
One address for a cluster of engines: speaks OpenAI's API to clients, pairs prefill with decode engines, and keeps
answering while engines come and go. Engines register themselves (engine --proxy-url http://this-host:8000)."""

EXAMPLE = """\
proxy --port 8000
engine --role prefill --model smollm2 --port 23333 --proxy-url http://127.0.0.1:8000
engine --role decode --model smollm2 --port 23334 --proxy-url http://127.0.0.1:8000"""

KEEPALIVE_S = 75.0
BACKLOG = 1024


def main() -> None:
    settings = load(ProxySettings, sys.argv[1:], prog="proxy", description=DESCRIPTION, example=EXAMPLE)
    configure(settings.log_level)
    http_log.addFilter(_is_not_a_strangers_fault)
    sys.exit(uvloop.run(serve(settings)))


def _is_not_a_strangers_fault(record: logging.LogRecord) -> bool:
    """Malformed requests have had their 400: no traceback for each."""
    return not (record.exc_info and isinstance(record.exc_info[1], HttpProcessingError))


async def serve(settings: ProxySettings) -> int:
    """Until SIGTERM or SIGINT; the process's exit status."""
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    runner = web.AppRunner(
        make_app(settings),
        handler_cancellation=True,  # a client that leaves ends its request, and that the engines' part of it
        access_log=None,
        logger=http_log,
        keepalive_timeout=KEEPALIVE_S,
        max_line_size=settings.max_header_bytes,
        max_field_size=settings.max_header_bytes,
        shutdown_timeout=settings.drain_timeout,
    )
    await runner.setup()
    try:
        await _listen(runner, settings)
        gc.freeze()  # what is loaded stays: looking through it for garbage would hold every stream up
        if settings.api_key and not settings.cluster_key_text:
            log.warning("without --cluster-key anybody may register an engine and be sent requests with their keys")
        await stopped.wait()
        log.info("stopping; requests under way have %g s to end", settings.drain_timeout)
    except OSError as error:
        print(f"proxy: error: cannot listen on {settings.host}:{settings.port}: {error.strerror}", file=sys.stderr)
        return 1
    finally:
        await runner.cleanup()
    return 0


async def _listen(runner: web.AppRunner, settings: ProxySettings) -> None:
    """Raises OSError when the address cannot be had."""
    tls = _tls(settings)
    await web.TCPSite(runner, settings.host, settings.port, ssl_context=tls, backlog=BACKLOG).start()
    host, port = runner.addresses[0][:2]
    log.info("listening on %s://%s:%d", "https" if tls else "http", f"[{host}]" if ":" in host else host, port)


def _tls(settings: ProxySettings) -> ssl.SSLContext | None:
    if settings.ssl_certfile is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(settings.ssl_certfile, settings.ssl_keyfile)
    return context


if __name__ == "__main__":
    main()
