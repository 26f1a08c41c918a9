"""The one thread of a transport: an event loop that owns its sockets and makes its copies."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine


class Reactor:
    """An asyncio loop in a daemon thread. All state of a transport belongs to that thread, so nothing is locked."""

    def __init__(self, name: str) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False
        self._thread.start()

    def call(self, function: Callable[..., object], *arguments: object) -> bool:
        """From the core's thread: has `function` called in the loop soon. False once closed."""
        if self._closed:
            return False
        self.loop.call_soon_threadsafe(function, *arguments)
        return True

    def start(
        self, coroutine: Coroutine[object, object, None], finish: Callable[[asyncio.Task[None]], None]
    ) -> asyncio.Task[None]:
        """In the loop's thread: a task that is held until it ends, and cancelled by `close`. Whatever the task owns is
        given back by `finish`, which runs even when the task is cancelled before its first step."""
        task = self.loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(finish)
        return task

    def close(self) -> None:
        """Cancels every task, waits for their ends, joins the thread. Idempotent."""
        if self._closed:
            return
        self._closed = True
        asyncio.run_coroutine_threadsafe(self._drain(), self.loop).result()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()

    async def _drain(self) -> None:
        while self._tasks:
            for task in list(self._tasks):
                task.cancel()
            await asyncio.wait(self._tasks)

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()
