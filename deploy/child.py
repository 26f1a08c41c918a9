"""One process of a cluster on this machine: started with a name, heard line by line, stopped for certain.

Each child leads its own process group, so that Ctrl-C reaches only the launcher, which then stops its children in
order, and so that the last resort, SIGKILL, reaches a child's own children too. A child whose launcher dies is told by
the kernel.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal as signals
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence

PR_SET_PDEATHSIG = 1
TAIL_LINES = 30
_libc = ctypes.CDLL(None, use_errno=True)

Listener = Callable[[str, str], None]  # (child's name, one line without its newline)


class Child:
    """A running process. Every method belongs to the launcher's main thread; `listener` is called from a thread."""

    def __init__(
        self, name: str, command: Sequence[str], env: dict[str, str], cores: Iterable[int], listener: Listener
    ) -> None:
        """Starts `command` with `env`, kept to `cores` (none: wherever the launcher may run)."""
        self.name = name
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._listener = listener
        allowed = set(cores)
        self._process = subprocess.Popen(
            command,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
            preexec_fn=lambda: _before_exec(allowed),  # noqa: PLW1509, two system calls that take no lock
        )
        self._reader = threading.Thread(target=self._read, name=f"log-{name}", daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs; negative: the signal that ended it."""
        return self._process.poll()

    def signal(self, number: signals.Signals) -> None:
        """To the process itself, not to its children. Without effect once it has ended."""
        self._process.send_signal(number)

    def signal_group(self, number: signals.Signals) -> None:
        """To the process and everything it started, even after it has itself ended."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def join(self, deadline: float) -> bool:
        """Waits until it has ended, at most until `deadline` (time.monotonic() seconds); whether it has."""
        try:
            self._process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            return False
        return True

    def finish(self) -> None:
        """Kills what is left of the group, and hears the last lines."""
        self.signal_group(signals.SIGKILL)
        self._process.wait()
        self._reader.join(timeout=2.0)

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                self.tail.append(line.rstrip("\n"))
                self._listener(self.name, line.rstrip("\n"))


def stop(children: Sequence[Child], grace_s: float) -> list[str]:
    """Ends all of them, together, within about `grace_s` seconds; the names of those that had to be killed."""
    for child in children:
        child.signal_group(signals.SIGCONT)  # a stopped process hears nothing else
        child.signal(signals.SIGTERM)
    deadline = time.monotonic() + grace_s
    killed = [child.name for child in children if not child.join(deadline)]
    for child in children:
        child.finish()
    return killed


def _before_exec(cores: set[int]) -> None:
    _libc.prctl(PR_SET_PDEATHSIG, signals.SIGTERM)
    if cores:
        os.sched_setaffinity(0, cores)
