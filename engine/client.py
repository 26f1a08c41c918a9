"""The API process's side of the core: submit a request, read its deltas, and never lose one."""

from __future__ import annotations

from collections.abc import AsyncIterator

from engine.core import Delta, ModelInfo, Request
from engine.messages import LinkCommand, Stats


class CoreClient:
    """One per API process. Every method belongs to the event loop's thread."""

    model: ModelInfo
    control_address: str
    incarnation: str
    stats: Stats | None  # the latest

    def generate(self, request: Request) -> AsyncIterator[Delta]:
        """Deltas of one request, the last with a finish reason. Closing the iterator early (client gone) aborts it in the
        core. Raises Overloaded when the bounded queue is full, InvalidRequest when it can never fit, Unavailable when the
        core has died."""
        raise NotImplementedError

    async def call(self, command: LinkCommand) -> bytes:
        """msgpack of the reply's value. Raises the TandemError that the core answered, or DeadlineExceeded."""
        raise NotImplementedError

    @property
    def alive(self) -> bool:
        """False once the core process has ended."""
        raise NotImplementedError
