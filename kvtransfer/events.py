"""What a transport has to tell, handed from its thread to the engine core's."""

from __future__ import annotations

import os
from collections import deque

from kvtransfer.transfer import Event


class EventQueue:
    """Events in order, and a descriptor that is readable while there are some. Bounded by what its users may start."""

    def __init__(self) -> None:
        self._events: deque[Event] = deque()
        self._fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def fileno(self) -> int:
        return self._fd

    def push(self, event: Event) -> None:
        """From any thread."""
        self._events.append(event)
        if self._fd >= 0:
            os.eventfd_write(self._fd, 1)

    def drain(self) -> list[Event]:
        """All events so far. Works after `close` too, for those that closing caused."""
        try:
            if self._fd >= 0:
                os.eventfd_read(self._fd)
        except BlockingIOError:
            return []
        return [self._events.popleft() for _ in range(len(self._events))]

    def close(self) -> None:
        """Idempotent. Only when no other thread pushes any more."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
