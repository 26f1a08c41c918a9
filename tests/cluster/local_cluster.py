"""A real cluster for tests: real processes, sockets and model, small pools, and a strict look at what it leaves.

    with LocalCluster(directory, prefill=1, decode=1) as cluster:
        cluster.client().completions.create(model=cluster.model, prompt="Hello", max_tokens=4)
        cluster.kill("prefill-1")
        cluster.assert_whole()

Leaving the block stops every process and checks that none is left, and no file in /dev/shm. All methods block, with
deadlines; call them through `asyncio.to_thread` in a test that must go on meanwhile.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
import uuid
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

import openai

from deploy import probe
from deploy.cluster import Cluster, Keys, Member
from deploy.logs import Logs
from deploy.ports import free_ports

MODEL = "smollm2"
MARK = "TANDEM_TEST_CLUSTER"  # in the environment of every process of one cluster, and of whatever they start
START_S = 120.0
STOP_S = 15.0
WHOLE_S = 30.0
POLL_S = 0.05
SETTLED_S = 0.3  # an idle engine's figures may be this old: so long they must hold

ENGINE_FLAGS = (
    *("--model", MODEL, "--dtype", "float32", "--device", "cpu", "--num-threads", "1"),
    *("--kv-cache-memory", "256MiB", "--heartbeat-seconds", "0.5", "--drain-timeout", "5"),
    *("--local-prefill-tokens", "0"),  # short prompts are handed over too
)
PROXY_FLAGS = ("--drain-timeout", "5")
SHARED_MEMORY = Path("/dev/shm")


class LocalCluster:
    """`prefill-1`, `decode-1`, … and `proxy` are the names of its processes."""

    def __init__(
        self,
        directory: Path,
        *,
        prefill: int = 1,
        decode: int = 1,
        hybrid: int = 0,
        engine_flags: Sequence[str] = (),
        prefill_flags: Sequence[str] = (),
        decode_flags: Sequence[str] = (),
        proxy_flags: Sequence[str] = (),
        keys: Keys | None = None,
    ) -> None:
        """`directory` takes the log files."""
        self.model = MODEL
        self.directory = directory
        self._mark = uuid.uuid4().hex
        self._logs = Logs(directory)
        by_role = {"prefill": prefill_flags, "decode": decode_flags, "hybrid": ()}
        roles = ["prefill"] * prefill + ["decode"] * decode + ["hybrid"] * hybrid
        proxy_port, *ports = free_ports(1 + len(roles))
        proxy_url = f"http://127.0.0.1:{proxy_port}"
        members = [Member("proxy", "proxy", proxy_url, ("--port", str(proxy_port), *PROXY_FLAGS, *proxy_flags))]
        for index, (role, port) in enumerate(zip(roles, ports, strict=True)):
            flags = ("--role", role, "--port", str(port), "--proxy-url", proxy_url)
            name = f"{role}-{roles[: index + 1].count(role)}"
            every = (*flags, *ENGINE_FLAGS, *engine_flags, *by_role[role])
            members.append(Member(name, role, f"http://127.0.0.1:{port}", every))
        self._cluster = Cluster(members, MODEL, keys or Keys(), self._logs.hear, print, {MARK: self._mark})

    def __enter__(self) -> Self:
        self._logs.__enter__()
        self._shared_memory = set(os.listdir(SHARED_MEMORY))
        try:
            self._cluster.start()
            self._cluster.wait_ready(START_S)
        except BaseException:
            self._cluster.kill()
            print("\n".join(f"==== {name}\n{text}" for name, text in self.logs().items()))
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        killed = self._cluster.stop(STOP_S)
        self._logs.__exit__(kind, error, trace)
        if error is None:
            assert not killed, f"did not end within {STOP_S} s of SIGTERM: {killed}"
            assert not self.processes(), f"processes left behind: {self.processes()}"
            left = set(os.listdir(SHARED_MEMORY)) - self._shared_memory
            assert not left, f"files left in {SHARED_MEMORY}: {left}"

    # Reaching it

    @property
    def proxy_url(self) -> str:
        return self._cluster.proxy_url

    @property
    def engines(self) -> list[str]:
        """Names of the engines."""
        return [member.name for member in self._cluster.engines]

    def url(self, name: str = "proxy") -> str:
        return self._member(name).url

    def client(self, name: str = "proxy", timeout_s: float = 60.0) -> openai.OpenAI:
        """The official client; it does not retry, so that a test sees every answer."""
        key = self._cluster.keys.user or "none"
        return openai.OpenAI(base_url=f"{self.url(name)}/v1", api_key=key, max_retries=0, timeout=timeout_s)

    def async_client(self, name: str = "proxy", timeout_s: float = 60.0) -> openai.AsyncOpenAI:
        key = self._cluster.keys.user or "none"
        return openai.AsyncOpenAI(base_url=f"{self.url(name)}/v1", api_key=key, max_retries=0, timeout=timeout_s)

    # Faults

    def kill(self, name: str) -> None:
        """kill -9 of the process and all it started; returns when they are gone."""
        self._cluster.children[name].finish()

    def freeze(self, name: str) -> None:
        """SIGSTOP of the process and all it started."""
        self._cluster.children[name].signal_group(signal.SIGSTOP)

    def thaw(self, name: str) -> None:
        self._cluster.children[name].signal_group(signal.SIGCONT)

    def terminate(self, name: str, timeout_s: float = STOP_S) -> int:
        """SIGTERM; its exit code once it has drained."""
        child = self._cluster.children[name]
        child.signal(signal.SIGTERM)
        assert child.join(time.monotonic() + timeout_s), f"{name} did not end within {timeout_s} s of SIGTERM"
        return child.exit_code or 0

    def has_losses(self) -> bool:
        return any(child.exit_code is not None for child in self._cluster.children.values())

    def start(self, name: str) -> None:
        """Starts again what has died, and does not wait for it."""
        self._cluster.start_member(self._member(name))

    def revive(self) -> None:
        """Starts what has died again, at its old address, thaws the rest, and waits until all is ready."""
        dead = [m for m in self._cluster.members if self._cluster.children[m.name].exit_code is not None]
        for member in self._cluster.members:
            self.thaw(member.name)
        for member in dead:
            self._cluster.start_member(member)
        for member in dead:  # the proxy may still know it from its former life
            self.eventually(partial(self._has_started, member), f"{member.name} answers", START_S)
        self._cluster.wait_ready(START_S)

    # Looking at it

    def metrics(self, name: str) -> dict[str, float]:
        """Metric name → value, summed over labels."""
        return probe.counters(self.url(name))

    def engine_metric(self, name: str, metric: str) -> float:
        """`tandem_engine_` is left out of the metric's name."""
        return self.metrics(name)[f"tandem_engine_{metric}"]

    def is_whole(self, name: str) -> bool:
        """Whether an engine holds no block and no sequence."""
        metrics = self.metrics(name)
        busy = sum(metrics[f"tandem_engine_requests_{state}"] for state in ("waiting", "running", "in_handoff"))
        return busy == 0 and metrics["tandem_engine_kv_blocks_free"] == metrics["tandem_engine_kv_blocks_total"]

    def assert_whole(self, timeout_s: float = WHOLE_S) -> None:
        """Every engine that lives has all its blocks back, soon, and keeps them."""
        living = [name for name in self.engines if self._cluster.children[name].exit_code is None]
        deadline = time.monotonic() + timeout_s
        whole_since: float | None = None
        while whole_since is None or time.monotonic() < whole_since + SETTLED_S:
            held = {name: self._held(name) for name in living if not self.is_whole(name)}
            assert time.monotonic() < deadline, f"blocks still held: {held}"
            whole_since = None if held else whole_since or time.monotonic()
            time.sleep(POLL_S)

    def eventually(self, condition: Callable[[], bool], what: str, timeout_s: float = 10.0) -> None:
        """Waits for a condition, such as one on metrics, which lag behind answers."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
            time.sleep(POLL_S)

    def logs(self) -> dict[str, str]:
        """Name → all that the process has written."""
        return {path.stem: path.read_text(errors="replace") for path in sorted(self.directory.glob("*.log"))}

    def processes(self) -> list[int]:
        """Every process of this cluster that runs, whoever started it."""
        return [int(entry) for entry in os.listdir("/proc") if entry.isdigit() and self._is_ours(int(entry))]

    def _is_ours(self, pid: int) -> bool:
        with contextlib.suppress(OSError):  # gone meanwhile, or another user's
            return f"{MARK}={self._mark}".encode() in Path(f"/proc/{pid}/environ").read_bytes()
        return False

    def _has_started(self, member: Member) -> bool:
        self._cluster.check_alive()
        try:
            return bool(probe.ask(f"{member.url}/health"))
        except probe.NotReady:
            return False

    def _member(self, name: str) -> Member:
        return next(member for member in self._cluster.members if member.name == name)

    def _held(self, name: str) -> dict[str, float]:
        return {key: value for key, value in self.metrics(name).items() if "requests_" in key or "kv_blocks" in key}
