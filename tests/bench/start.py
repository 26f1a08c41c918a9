"""From the command to the first token, and where the time goes.

    python -m tests.bench.start
    python -m tests.bench.start --rounds 9 --beside before=/path/of/another/checkout

Every round starts each thing once, here and in each other checkout, in turn: an interpreter that does nothing (the
floor), one hybrid engine until it has streamed a first token, the proxy until it is healthy, and `scripts/serve` until
a completion has gone through prefill and decode. Stages are told by the log; figures are medians of seconds since the
command. The processor time is of the whole tree of processes, from start to end; it is what a busy machine stretches.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from deploy.ports import free_ports
from tests.bench.report import machine, table

HERE = Path(__file__).resolve().parent.parent.parent
DEADLINE_S = 180.0
POLL_S = 0.01
END_S = 30.0

# What the log says → the stage that has then ended.
STAGES = {
    "starting the core": "settings read, port held",
    "told what to load": "core: imported",
    "weights loaded": "core: weights",
    "pool allocated": "core: pool",
    "warmed up": "core: warm-up",
    "tokenizer ready": "tokenizer and server",
    "core ready": "core ready",
    "listening on": "listens",
    "proxy listens": "proxy listens",
    "prefill-1 registered": "prefill registered",
    "decode-1 registered": "decode registered",
    "went through every role": "first completion",
}
CPU = "processor time, s"


@dataclass
class Started:
    """One process tree under way: what its log has told, in seconds since the command."""

    process: subprocess.Popen[str]
    began: float
    marks: dict[str, float] = field(default_factory=dict)

    def mark(self, stage: str) -> None:
        self.marks.setdefault(stage, time.monotonic() - self.began)

    def listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            for said, stage in STAGES.items():
                if said in line:
                    self.mark(stage)

    def until(self, done: str) -> None:
        while done not in self.marks:
            self.check()
            time.sleep(POLL_S)

    def check(self) -> None:
        if self.process.poll() is not None:
            raise RuntimeError(f"{self.process.args} ended with {self.process.returncode}")
        if time.monotonic() - self.began > DEADLINE_S:
            raise RuntimeError(f"{self.process.args} was not ready after {DEADLINE_S:g} s")


@contextlib.contextmanager
def started(command: Sequence[str], checkout: Path) -> Iterator[Started]:
    """Ended, with everything it started, on the way out."""
    env = {**os.environ, "PYTHONPATH": str(checkout)}
    began = time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=checkout,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    run = Started(process, began)
    listener = threading.Thread(target=run.listen)
    listener.start()
    try:
        yield run
    finally:
        spent_before = _children_cpu_s()
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(END_S)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            listener.join()
        run.marks[CPU] = _children_cpu_s() - spent_before


def _children_cpu_s() -> float:
    """Of all children that have ended, and of theirs."""
    times = os.times()
    return times.children_user + times.children_system


def floor(checkout: Path, model: str) -> dict[str, float]:
    began, spent = time.monotonic(), _children_cpu_s()
    subprocess.run([sys.executable, "-c", "pass"], check=True)
    return {"ended": time.monotonic() - began, CPU: _children_cpu_s() - spent}


def engine(checkout: Path, model: str) -> dict[str, float]:
    (port,) = free_ports(1)
    flags = ["--model", model, "--port", str(port), "--log-level", "debug"]
    with started([sys.executable, "-m", "engine", *flags], checkout) as run:
        _until_healthy(run, port)
        _first_token(port, model)
        run.mark("first streamed token")
    return run.marks


def proxy(checkout: Path, model: str) -> dict[str, float]:
    (port,) = free_ports(1)
    with started([sys.executable, "-m", "proxy", "--port", str(port)], checkout) as run:
        _until_healthy(run, port)
    return run.marks


def serve(checkout: Path, model: str) -> dict[str, float]:
    (port,) = free_ports(1)
    command = [sys.executable, "-u", "-m", "deploy.local", "--model", model, "--port", str(port)]
    if (checkout / ".venv").is_dir():  # what the script would first install is not what is measured
        command = ["scripts/serve", "--model", model, "--port", str(port)]
    with started(command, checkout) as run:
        run.until("first completion")
    return run.marks


def _until_healthy(run: Started, port: int) -> None:
    while not _is_healthy(port):
        run.check()
        time.sleep(POLL_S)
    run.mark("/health is ok")


def _is_healthy(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def _first_token(port: int, model: str) -> None:
    """A chat, so that the template has its part; read until the first text. Raises RuntimeError when none comes."""
    body = {"model": model, "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 8, "stream": True}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE_S)
    with contextlib.closing(connection):
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        for line in connection.getresponse():
            if line.startswith(b"data: {") and json.loads(line[6:])["choices"][0]["delta"].get("content"):
                return
    raise RuntimeError("the answer ended without a token")


THINGS = {"python -c pass": floor, "engine --role hybrid": engine, "proxy": proxy, "scripts/serve": serve}


def measure(
    checkouts: dict[str, Path], model: str, rounds: int, only: Sequence[str]
) -> dict[str, dict[str, list[dict[str, float]]]]:
    """Thing → checkout's name → each round's marks."""
    found: dict[str, dict[str, list[dict[str, float]]]] = {
        thing: {name: [] for name in checkouts} for thing in THINGS if not only or thing in only
    }
    for number in range(rounds):
        for thing, by_checkout in found.items():
            for name in sorted(checkouts, reverse=bool(number % 2)):
                by_checkout[name].append(THINGS[thing](checkouts[name], model))
    return found


def rows(thing: str, by_checkout: dict[str, list[dict[str, float]]]) -> list[list[str]]:
    """One a stage, in the order in which the stages end."""
    medians = {
        name: {stage: statistics.median(run[stage] for run in runs if stage in run) for run in runs for stage in run}
        for name, runs in by_checkout.items()
    }
    ours = medians["here"]
    stages = sorted((stage for stage in ours if stage != CPU), key=lambda stage: ours[stage])
    return [
        [thing, stage, *(f"{found[stage]:.2f}" if stage in found else "–" for found in medians.values())]
        for stage in [*stages, CPU]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--only", action="append", default=[], choices=THINGS, help="repeatable")
    parser.add_argument(
        "--beside", action="append", default=[], metavar="NAME=DIR", help="another checkout; repeatable"
    )
    arguments = parser.parse_args()
    others = {name: Path(path).resolve() for name, _, path in (beside.partition("=") for beside in arguments.beside)}
    checkouts = {"here": HERE} | others
    found = measure(checkouts, arguments.model, arguments.rounds, arguments.only)
    print(f"{machine()}; medians of {arguments.rounds}, seconds since the command\n")
    print(table(["start of", "until", *checkouts], [row for thing in found for row in rows(thing, found[thing])]))


if __name__ == "__main__":
    main()
