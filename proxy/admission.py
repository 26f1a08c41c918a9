"""How much the proxy takes on at once: so many requests under way, so many waiting for them, and 429 beyond."""

from __future__ import annotations

import asyncio
from collections import deque
from types import TracebackType

from engine.api.errors import Overloaded


class Admission:
    """`async with admission:` around a request. First come, first served."""

    def __init__(self, limit: int, queue: int, patience_s: float) -> None:
        self._limit, self._queue, self._patience_s = limit, queue, patience_s
        self._waiting: deque[asyncio.Future[None]] = deque()
        self.under_way = 0

    @property
    def queued(self) -> int:
        return len(self._waiting)

    async def __aenter__(self) -> None:
        """Raises Overloaded when the queue is full, or the wait in it too long."""
        if self.under_way < self._limit:
            self.under_way += 1
            return
        if len(self._waiting) >= self._queue:
            raise Overloaded(f"{self._limit} requests are under way and {self._queue} wait: try again in a moment")
        await self._wait()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave()

    async def _wait(self) -> None:
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            async with asyncio.timeout(self._patience_s):
                await turn
        except TimeoutError:
            self._withdraw(turn)
            raise Overloaded(f"No turn came within {self._patience_s:g} s: try again later", retry_after_s=5) from None
        except asyncio.CancelledError:
            self._withdraw(turn)
            raise

    def _withdraw(self, turn: asyncio.Future[None]) -> None:
        if turn.done() and not turn.cancelled():
            self._leave()  # its turn had just come
        elif turn in self._waiting:
            self._waiting.remove(turn)

    def _leave(self) -> None:
        """Hands the place on, or gives it up."""
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self.under_way -= 1
