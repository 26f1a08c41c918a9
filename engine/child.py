"""The core's process, as its parent sees it. It is begun before anything is known of it, so that it imports what it
needs while its parent imports what itself needs; what to do it learns later, on its standard input.

Imports next to nothing, for the same reason.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import subprocess
import sys
from types import TracebackType
from typing import Self

PR_SET_PDEATHSIG = 1


class CoreChild:
    """`with CoreChild() as child`: it has ended when that is left."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [
                sys.executable,
                *(["-P"] if sys.flags.safe_path else []),  # never an `engine/` of the current directory
                "-m",
                "engine.process",
            ],
            stdin=subprocess.PIPE,
            preexec_fn=_before_exec,  # noqa: PLW1509, two system calls that take no lock
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()

    def tell(self, orders: bytes) -> None:
        """What `engine.process.main` reads: said once. Not in its arguments, where `ps` would show the keys."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(orders)
            self._process.stdin.close()
        except BrokenPipeError:  # it has died, which `ended` says
            pass

    def end(self) -> None:
        """Asks it to; without effect when it has ended."""
        self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self._process.kill()

    @property
    def exit_code(self) -> int | None:
        """None while it runs; negative: the signal that ended it."""
        return self._process.poll()

    async def ended(self) -> int:
        """Waits for its end; its exit code."""
        if self._process.poll() is None:
            descriptor = os.pidfd_open(self._process.pid)
            try:
                await _readable(descriptor)
            finally:
                os.close(descriptor)
        return self._process.wait()


async def _readable(descriptor: int) -> None:
    loop, ready = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(descriptor, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(descriptor)


def _before_exec() -> None:
    """The parent may be killed -9: a core that nobody can reach must not live on. Ctrl-C reaches the whole group; the
    parent decides."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
