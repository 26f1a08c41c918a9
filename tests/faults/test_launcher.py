"""`python -m deploy.local` as a user meets it: what it refuses, and that nothing is left however it ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from deploy import probe
from deploy.cluster import ROOT
from deploy.ports import free_ports
from tests.cluster.local_cluster import MARK, SHARED_MEMORY

pytestmark = pytest.mark.cluster

START_S, END_S = 120.0, 20.0
SMALL = ("--engine-kv-cache-memory", "64MiB", "--engine-dtype", "float32", "--stop-timeout", "4")


class Launched:
    """One launcher; every process that it starts carries its mark."""

    def __init__(self, module: str, *flags: str) -> None:
        self.mark = uuid.uuid4().hex
        self.text = ""
        self._heard = threading.Condition()
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-u", "-m", module, *flags],
            env=os.environ | {"PYTHONPATH": str(ROOT), MARK: self.mark},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def wait_for(self, text: str) -> None:
        with self._heard:
            assert self._heard.wait_for(lambda: text in self.text, START_S), self.text

    def exit_code(self) -> int:
        code = self.process.wait(END_S)
        self._reader.join(END_S)
        return code

    def left(self) -> list[int]:
        """Processes of its that still run."""
        return [int(entry) for entry in os.listdir("/proc") if entry.isdigit() and self._is_ours(entry)]

    def engine(self) -> int:
        """The process of one engine's API."""
        for pid in self.left():
            if b"-m\0engine\0" in Path(f"/proc/{pid}/cmdline").read_bytes():
                return pid
        raise AssertionError("no engine runs")

    def end(self) -> None:
        for pid in self.left():
            os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def _is_ours(self, entry: str) -> bool:
        try:
            return f"{MARK}={self.mark}".encode() in Path(f"/proc/{entry}/environ").read_bytes()
        except OSError:  # gone meanwhile, or another user's
            return False

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                with self._heard:
                    self.text += line
                    self._heard.notify_all()


@contextmanager
def launched(module: str, *flags: str) -> Iterator[Launched]:
    started = Launched(module, *flags)
    try:
        yield started
    finally:
        started.end()


@contextmanager
def cluster() -> Iterator[Launched]:
    """Ready, and afterwards gone without a trace."""
    files = set(os.listdir(SHARED_MEMORY))
    (port,) = free_ports(1)
    with launched("deploy.local", "--port", str(port), *SMALL) as started:
        started.wait_for("Ctrl-C stops everything")
        assert probe.complete(f"http://127.0.0.1:{port}", "smollm2", None, START_S).strip().startswith("Paris")
        yield started
        deadline = time.monotonic() + END_S
        while started.left():
            assert time.monotonic() < deadline, f"left behind: {started.left()}"
            time.sleep(0.05)
        assert set(os.listdir(SHARED_MEMORY)) <= files


def test_ctrl_c_leaves_nothing() -> None:
    with cluster() as started:
        os.killpg(started.process.pid, signal.SIGINT)
        assert started.exit_code() == 0
        assert "Traceback" not in started.text


def test_a_killed_engine_ends_the_cluster_and_says_which() -> None:
    with cluster() as started:
        os.kill(started.engine(), signal.SIGKILL)
        assert started.exit_code() == 1
        assert "ended with exit code -9" in started.text
        assert "Traceback" not in started.text


def test_a_killed_launcher_leaves_nothing() -> None:
    with cluster() as started:
        started.process.kill()


@pytest.mark.parametrize(
    ("module", "flags", "code", "says"),
    [
        ("deploy.local", ("--prot", "1"), 2, "unknown flag '--prot', did you mean '--port'?"),
        ("deploy.local", ("--model", "/no/such/model"), 1, "--model"),
        ("deploy.local", ("--prefill", "0"), 2, "--prefill and --decode"),
        ("proxy", ("--prot", "1"), 2, "unknown flag '--prot', did you mean '--port'?"),
        ("proxy", ("--port", "high"), 2, "--port"),
        ("engine", ("--model", "smollm2", "--block-size", "17"), 2, "power of two"),
    ],
)
def test_wrong_flags_are_one_clear_line(module: str, flags: tuple[str, ...], code: int, says: str) -> None:
    _assert_refused(module, flags, code, says)


@pytest.mark.parametrize("module", ["proxy", "engine", "deploy.local"])
def test_a_wrong_key_in_a_file_is_one_clear_line(module: str, tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("model: smollm2\nprot: 1\n" if module != "proxy" else "prot: 1\n")
    _assert_refused(module, ("--config", str(file)), 2, "'prot'")


@pytest.mark.parametrize("module", ["proxy", "deploy.local"])
def test_a_port_in_use_is_one_clear_line(module: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        _assert_refused(module, ("--port", port), 1, port)


def test_a_model_that_may_not_be_read_is_one_clear_line(tmp_path: Path) -> None:
    directory = tmp_path / "model"
    directory.mkdir()
    _assert_refused("engine", ("--model", str(directory)), 1, "neither config.json nor a GGUF file")


def _assert_refused(module: str, flags: tuple[str, ...], code: int, says: str) -> None:
    with launched(module, *flags) as refused:
        assert refused.exit_code() == code, refused.text
        lines = refused.text.splitlines()
        assert len(lines) == 1, lines
        assert lines[0].startswith(f"{module}: error: ")
        assert says in lines[0]
        assert not refused.left()
