"""An engine process from its start to its end: what it refuses, how it drains, what it says when its core dies."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import openai
import pytest

from deploy import probe
from deploy.child import Child
from deploy.cluster import ROOT
from deploy.ports import free_ports
from tests.cluster.local_cluster import ENGINE_FLAGS

pytestmark = pytest.mark.cluster
DEADLINE_S = 90.0


class Engine:
    """A hybrid engine of its own, whose lines can be waited for."""

    def __init__(self, port: int, *flags: str) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.lines: list[str] = []
        self._changed = threading.Condition()
        command = [sys.executable, "-P", "-m", "engine", "--port", str(port), *ENGINE_FLAGS, *flags]
        self.child = Child("engine", command, os.environ | {"PYTHONPATH": str(ROOT)}, (), self._hear)

    def wait_for(self, text: str) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: any(text in line for line in self.lines), DEADLINE_S), self.lines

    def exit_code(self) -> int | None:
        assert self.child.join(time.monotonic() + DEADLINE_S), f"still running: {self.lines}"
        self.child.finish()
        return self.child.exit_code

    def core_pid(self) -> int:
        """Waits for the core when the engine is still starting it."""
        deadline = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline:
            for pid in self._children():
                if b"engine.process" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    return pid
            time.sleep(0.01)
        raise AssertionError(f"no core: {self.lines}")

    def _children(self) -> list[int]:
        return [int(pid) for pid in Path(f"/proc/{self.child.pid}/task/{self.child.pid}/children").read_text().split()]

    def _hear(self, _name: str, line: str) -> None:
        with self._changed:
            self.lines.append(line)
            self._changed.notify_all()


@contextmanager
def engine(*flags: str, port: int | None = None) -> Iterator[Engine]:
    started = Engine(port or free_ports(1)[0], *flags)
    try:
        yield started
    finally:
        started.child.finish()


@contextmanager
def long_answer(url: str) -> Iterator[openai.Stream[openai.types.Completion]]:
    """A stream that has begun and would go on for minutes."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=DEADLINE_S)
    arguments = {"extra_body": {"ignore_eos": True}, "max_tokens": 3000, "temperature": 0}
    with client, client.completions.create(model="smollm2", prompt="Once", stream=True, **arguments) as stream:  # type: ignore[call-overload]
        assert next(iter(stream)).choices
        yield stream


def test_a_port_in_use_is_one_clear_line_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with engine(port=port) as refused:
            assert refused.exit_code() == 1
            assert refused.lines == [
                f"engine: error: cannot listen on 127.0.0.1 port {port}: address already in use; "
                "choose another with --host and --port"
            ]


@pytest.mark.parametrize("model", ["/no/such/model", "README.md"])
def test_a_model_that_is_not_there_is_one_clear_line_at_once(model: str) -> None:
    with engine("--model", model) as refused:
        assert refused.exit_code() == 1
        assert len(refused.lines) == 1
        assert refused.lines[0].startswith("engine: error: --model: ")
        assert model in refused.lines[0]


def test_a_file_that_only_looks_like_a_model_does_not_start(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(200))
    with engine("--model", str(broken)) as refused:
        assert refused.exit_code() == 1
        assert refused.lines[-1].startswith("engine: error: ")


def test_an_unknown_flag_leaves_with_2() -> None:
    with engine("--prot", "1") as refused:
        assert refused.exit_code() == 2
        assert refused.lines == ["engine: error: unknown flag '--prot', did you mean '--port'?"]


def test_an_unreachable_proxy_is_said_once_and_the_engine_serves() -> None:
    nobody = f"http://127.0.0.1:{free_ports(1)[0]}"
    with engine("--proxy-url", nobody, "--heartbeat-seconds", "0.1") as alone:
        alone.wait_for(f"the proxy {nobody} cannot be reached")
        probe.ask(f"{alone.url}/health")
        with long_answer(alone.url):
            pass
        assert sum("cannot be reached" in line for line in alone.lines) == 1


def test_a_signal_while_starting_ends_it_without_a_trace() -> None:
    with engine() as starting:
        starting.wait_for("starting the core")
        core = starting.core_pid()
        starting.child.signal(signal.SIGTERM)
        assert starting.exit_code() == 0
        assert not Path(f"/proc/{core}").exists()
        assert not any("Traceback" in line for line in starting.lines)


def test_a_drain_that_takes_too_long_ends_requests_with_a_true_error() -> None:
    with engine("--drain-timeout", "0.5") as draining:
        draining.wait_for("listening")
        with long_answer(draining.url) as stream:
            draining.child.signal(signal.SIGTERM)
            with pytest.raises(openai.APIError, match="shut down"):
                list(stream)
        assert draining.exit_code() == 0


def test_what_runs_at_shutdown_may_finish() -> None:
    with engine("--drain-timeout", "30") as draining:
        draining.wait_for("listening")
        client = openai.OpenAI(base_url=f"{draining.url}/v1", api_key="none", max_retries=0, timeout=DEADLINE_S)
        with client, client.completions.create(model="smollm2", prompt="Once", stream=True, max_tokens=40) as stream:
            chunks = iter(stream)
            next(chunks)
            draining.child.signal(signal.SIGTERM)
            assert [*chunks][-1].choices[0].finish_reason in ("length", "stop")
        assert draining.exit_code() == 0


def test_a_second_signal_ends_it_at_once() -> None:
    with engine("--drain-timeout", "60") as draining:
        draining.wait_for("listening")
        core = draining.core_pid()
        with long_answer(draining.url):
            draining.child.signal(signal.SIGINT)
            draining.wait_for("draining")
            draining.child.signal(signal.SIGINT)
            assert draining.child.join(time.monotonic() + 5)
            assert draining.child.exit_code == 128 + signal.SIGINT
            wait_until_gone(core)


def test_when_the_core_dies_requests_are_told_and_the_engine_exits_1() -> None:
    with engine() as crashed:
        crashed.wait_for("listening")
        with long_answer(crashed.url) as stream:
            os.kill(crashed.core_pid(), signal.SIGKILL)
            with pytest.raises(openai.APIError, match="core"):
                list(stream)
        assert crashed.exit_code() == 1
        assert any("the core has died" in line for line in crashed.lines)


def test_the_core_ends_with_an_api_process_that_is_killed() -> None:
    with engine() as killed:
        killed.wait_for("listening")
        core = killed.core_pid()
        killed.child.signal(signal.SIGKILL)
        wait_until_gone(core)


def wait_until_gone(pid: int, timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while Path(f"/proc/{pid}").exists() and "State:\tZ" not in Path(f"/proc/{pid}/status").read_text():
        assert time.monotonic() < deadline, f"process {pid} is still there"
        time.sleep(0.05)
