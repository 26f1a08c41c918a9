"""How a process is asked to end: the first SIGTERM or SIGINT politely, the second at once."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class ShutdownRequested(Exception):
    """Leaves `Shutdown.interrupts`, so that what had begun is undone like after any failure."""


class Shutdown:
    """Create it on the event loop, once per process: from then on the two signals come here."""

    def __init__(self) -> None:
        self.requested = asyncio.Event()
        self._scope: asyncio.Timeout | None = None
        self._loop = asyncio.get_running_loop()
        for number in SIGNALS:
            self._loop.add_signal_handler(number, self._on_signal, number)

    @asynccontextmanager
    async def interrupts(self, deadline_s: float) -> AsyncIterator[None]:
        """What runs inside is cancelled by a signal, with ShutdownRequested, and at its deadline, with TimeoutError."""
        if self.requested.is_set():
            raise ShutdownRequested
        try:
            async with asyncio.timeout(deadline_s) as self._scope:
                yield
        except TimeoutError:
            if self.requested.is_set():
                raise ShutdownRequested from None
            raise
        finally:
            self._scope = None

    def _on_signal(self, number: signal.Signals) -> None:
        if self.requested.is_set():
            os._exit(128 + number)
        self.requested.set()
        if self._scope is not None and not self._scope.expired():
            self._scope.reschedule(self._loop.time())
