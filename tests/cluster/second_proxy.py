"""Another proxy in front of a cluster's engines, with flags of its own: the engines are registered with it by hand."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import openai

from deploy import probe
from deploy.child import Child, stop
from deploy.cluster import ROOT
from deploy.logs import Logs
from deploy.ports import free_ports
from tests.cluster.local_cluster import LocalCluster

READY_S = 30.0
POLL_S = 0.05
ROLES = {"hybrid": 1, "prefill": 2, "decode": 3}  # on the wire


class SecondProxy:
    """Use it as `with SecondProxy(cluster, "--handoff", "sequential") as proxy`. Returns with every pair linked."""

    def __init__(self, cluster: LocalCluster, *flags: str) -> None:
        self._cluster = cluster
        (port,) = free_ports(1)
        self.url = f"http://127.0.0.1:{port}"
        self._command = [sys.executable, "-P", "-u", "-m", "proxy", "--port", str(port), "--drain-timeout", "2", *flags]
        self._logs = Logs(Path(cluster.directory) / f"proxy-{port}")

    def __enter__(self) -> Self:
        self._logs.__enter__()
        self._child = Child("proxy", self._command, os.environ | {"PYTHONPATH": str(ROOT)}, (), self._logs.hear)
        try:
            self._register()
        except BaseException:
            self._child.finish()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        stop([self._child], 5.0)
        self._logs.__exit__(kind, error, trace)

    def client(self, timeout_s: float = 60.0) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=timeout_s)

    def signal(self, number: signal.Signals) -> None:
        self._child.signal(number)

    def handoffs(self, order: str) -> float:
        """How many hand-offs it has begun in this order."""
        text = probe.ask(f"{self.url}/metrics").decode()
        found = [line for line in text.splitlines() if line.startswith("tandem_proxy_handoffs") and order in line]
        return sum(float(line.rsplit(" ", 1)[1]) for line in found)

    def _register(self) -> None:
        deadline = time.monotonic() + READY_S
        while not self._listens():
            assert time.monotonic() < deadline, "the second proxy does not listen"
            time.sleep(POLL_S)
        for name in self._cluster.engines:
            role = ROLES[name.split("-")[0]]
            status = {"role": role, "models": [self._cluster.model], "incarnation": f"second view of {name}"}
            probe.ask(f"{self.url}/nodes/add", {"url": self._cluster.url(name), "status": status})
        probe.ask(f"{self.url}/distserve/connection_warmup", {}, deadline_s=READY_S)

    def _listens(self) -> bool:
        try:
            return bool(json.loads(probe.ask(f"{self.url}/health")))
        except probe.NotReady:
            return False
