"""`python -m deploy.local`, as a user meets it: it starts, says where it is, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from deploy import probe
from deploy.child import Child
from deploy.cluster import ROOT
from deploy.ports import free_ports

pytestmark = pytest.mark.cluster
MARK = "TANDEM_TEST_LAUNCHER"
SMALL = ("--engine-dtype", "float32", "--engine-kv-cache-memory", "64MiB", "--stop-timeout", "5")
DEADLINE_S = 120.0


class Launcher:
    """A running launcher, whose lines can be waited for and whose processes can be counted."""

    def __init__(self, *flags: str) -> None:
        self.lines: list[str] = []
        self._mark = uuid.uuid4().hex
        self._changed = threading.Condition()
        env = os.environ | {"PYTHONPATH": str(ROOT), MARK: self._mark}
        self.child = Child("launcher", [sys.executable, "-m", "deploy.local", *flags], env, (), self._hear)

    def wait_for(self, text: str) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: any(text in line for line in self.lines), DEADLINE_S), self.lines

    def exit_code(self) -> int | None:
        assert self.child.join(time.monotonic() + DEADLINE_S), f"still running: {self.lines}"
        return self.child.exit_code

    def processes(self, having: str = "") -> list[int]:
        """Those that it started, and the launcher, whose command line holds `having`."""
        found = []
        for entry in filter(str.isdigit, os.listdir("/proc")):
            try:
                environment = Path(f"/proc/{entry}/environ").read_bytes()
                command = Path(f"/proc/{entry}/cmdline").read_bytes()
            except OSError:  # it has gone meanwhile, or is another user's
                continue
            if f"{MARK}={self._mark}".encode() in environment and having.encode() in command:
                found.append(int(entry))
        return found

    def _hear(self, _name: str, line: str) -> None:
        with self._changed:
            self.lines.append(line)
            self._changed.notify_all()


@contextmanager
def launcher(*flags: str) -> Iterator[Launcher]:
    started = Launcher(*flags)
    try:
        yield started
    finally:
        started.child.finish()
        for pid in started.processes():
            os.kill(pid, signal.SIGKILL)


def test_it_starts_answers_and_stops_without_a_trace() -> None:
    port, shared_memory = free_ports(1)[0], set(os.listdir("/dev/shm"))
    with launcher("--port", str(port), *SMALL) as local:
        local.wait_for("Ctrl-C stops everything")
        assert any("a completion went through every role" in line for line in local.lines)
        assert "Paris" in probe.complete(f"http://127.0.0.1:{port}", "smollm2", None, 60)
        local.child.signal(signal.SIGINT)
        assert local.exit_code() == 0
        assert local.processes() == []
    assert set(os.listdir("/dev/shm")) <= shared_memory
    assert local.lines[-1] == "stopped"


def test_the_death_of_an_engine_stops_everything_and_is_explained() -> None:
    with launcher("--port", str(free_ports(1)[0]), *SMALL) as local:
        local.wait_for("Ctrl-C stops everything")
        os.kill(local.processes(having="decode")[0], signal.SIGKILL)
        assert local.exit_code() == 1
        assert local.processes() == []
        assert any(line.startswith("deploy.local: error: decode-1 ended with exit code -9") for line in local.lines)


def test_an_engine_that_cannot_start_is_explained() -> None:
    with launcher("--port", str(free_ports(1)[0]), *SMALL, "--engine-block-size", "12") as local:
        assert local.exit_code() == 1
        assert local.processes() == []
        assert any("--block-size: must be a power of two" in line for line in local.lines)


def test_a_port_in_use_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with launcher("--port", str(port)) as local:
            assert local.exit_code() == 1
            assert len(local.lines) == 1
            assert local.lines[0].startswith(f"deploy.local: error: port {port} on 127.0.0.1 is in use")
