"""LMDeploy's own proxy, unmodified, in front of engines of ours.

It needs packages that ours must not: name an interpreter that has them in TANDEM_LMDEPLOY_PYTHON, or the tests skip
themselves. docs/protocol.md says how to make one.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Self

import openai
import pytest

from deploy import probe
from deploy.child import Child, stop
from deploy.cluster import Member
from deploy.logs import Logs
from deploy.ports import free_ports
from tests.cluster.local_cluster import LocalCluster

PYTHON_VARIABLE = "TANDEM_LMDEPLOY_PYTHON"
READY_S = 90.0  # it imports torch and transformers first
STOP_S = 10.0
POLL_S = 0.1


@cache
def lmdeploy_python() -> str:
    """The interpreter that has LMDeploy. Skips the calling test, saying why, where there is none."""
    python = os.environ.get(PYTHON_VARIABLE)
    if not python:
        pytest.skip(f"{PYTHON_VARIABLE} names no interpreter that has LMDeploy; docs/protocol.md says how to make one")
    command = [python, "-c", "import lmdeploy.serve.proxy.proxy"]
    found = subprocess.run(command, check=False, capture_output=True, text=True, timeout=READY_S)
    assert found.returncode == 0, f"{python} cannot import LMDeploy's proxy:\n{found.stderr[-2000:]}"
    return python


def proxy_command(python: str, port: str, strategy: str) -> list[str]:
    flags = ["--server-name", "127.0.0.1", "--server-port", port, "--serving-strategy", strategy]
    return [python, "-P", "-u", "-m", "lmdeploy", "serve", "proxy", *flags, "--disable-cache-status"]


@dataclass(frozen=True, slots=True)
class LMDeployProxy(Member):
    """Stands where our proxy would."""

    python: str = ""

    @property
    def command(self) -> list[str]:
        return proxy_command(self.python, self.url.rsplit(":", 1)[1], "DistServe")


class LMDeployCluster(LocalCluster):
    """A prefill and a decode engine of ours, registered by themselves with LMDeploy's proxy (DistServe)."""

    def __init__(self, directory: Path, python: str, engine_flags: Sequence[str] = ()) -> None:
        super().__init__(directory, engine_flags=engine_flags)
        proxy, *engines = self._cluster.members
        self._cluster.members = [LMDeployProxy("proxy", "proxy", proxy.url, (), python=python), *engines]

    def log(self, name: str) -> str:
        return self.logs()[name]


class HybridProxy:
    """A second proxy of LMDeploy's, serving strategy Hybrid. `with` returns once it listens; it knows nobody."""

    def __init__(self, directory: Path, python: str) -> None:
        port = str(free_ports(1)[0])
        self.url = f"http://127.0.0.1:{port}"
        self._command = proxy_command(python, port, "Hybrid")
        self._logs = Logs(directory)

    def __enter__(self) -> Self:
        self._logs.__enter__()
        self._child = Child("lmdeploy", self._command, dict(os.environ), (), self._logs.hear)
        deadline = time.monotonic() + READY_S
        try:
            while not self._listens():
                assert self._child.exit_code is None, list(self._child.tail)
                assert time.monotonic() < deadline, f"LMDeploy's proxy does not listen: {list(self._child.tail)}"
                time.sleep(POLL_S)
        except BaseException:
            self._child.finish()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        stop([self._child], STOP_S)
        self._logs.__exit__(kind, error, trace)

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)

    def _listens(self) -> bool:
        try:
            return probe.nodes(self.url, None) == {}
        except probe.NotReady:
            return False
