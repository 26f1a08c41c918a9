"""Servers to measure: named on the command line, started, watched, kept quiet while others are measured, and stopped.

hybrid                                one of our set-ups: hybrid, pair, two-hybrids
q4=hybrid --quantization auto         the same under a name of its own, with further engine flags
vllm                                  a peer by its recipe: vllm, vllm-two, vllm-pd, llama.cpp
other=http://127.0.0.1:8001#model     anything that speaks OpenAI's API; it is neither started nor stopped
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import shlex
import signal
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from deploy.child import Child, stop
from deploy.logs import Logs
from engine.models.resolve import resolve
from tests.bench import ours, peers
from tests.bench.load import Target, open_session, stream, text_of
from tests.bench.peers import Launch, Missing, Places

RECIPES = {**ours.RECIPES, **peers.RECIPES}
FIRST_PROMPT = 100  # words: longer than what a decode engine computes itself
FIRST_TOKENS = 4  # more than one, which a prefill engine gives alone
POLL_S = 0.05
STOP_S = 10.0
IDLE_S = 2.0
SETTLE_S = 1.0
TAKT_S = 0.1
BUSY_CORES = 0.2
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Wanted:
    """A server as the command line names it: a recipe with flags, or a URL."""

    name: str
    recipe: str | None
    flags: tuple[str, ...] = ()
    url: str = ""

    @property
    def is_ours(self) -> bool:
        return self.recipe in ours.RECIPES


def wanted(text: str) -> Wanted:
    """Parses `recipe`, `name=recipe flags` or `name=URL[#model]`. Raises argparse.ArgumentTypeError."""
    name, _, rest = text.partition("=") if "=" in text.split(" ")[0] else (text.split(" ")[0], "", text)
    if rest.startswith(("http://", "https://")):
        return Wanted(name, None, url=rest)
    recipe, *flags = shlex.split(rest)
    if recipe not in RECIPES:
        raise argparse.ArgumentTypeError(f"{recipe!r} is none of {', '.join(RECIPES)}, and no NAME=URL")
    return Wanted(name, recipe, tuple(flags))


class Died(Exception):
    """A server under test has ended, or never began to answer; the message has its last lines."""


@dataclass(slots=True)
class Server:
    """A server that answers. One by URL has no children, and is never stopped."""

    wanted: Wanted
    target: Target
    children: list[Child] = field(default_factory=list)
    may_stop: bool = False
    start_s: float | None = None  # from the command to the first token
    idle_cores: float = 0.0  # how much processor it takes while nobody asks it anything

    @property
    def name(self) -> str:
        return self.wanted.name

    def pause(self) -> None:
        """Takes no processor until `resume`; does nothing to a server whose processes must go on."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        for child in self.children if self.may_stop else ():
            child.signal_group(number)

    def check_alive(self) -> None:
        """Raises Died."""
        for child in self.children:
            if child.exit_code is not None:
                child.finish()  # its last lines may still be on their way
                raise Died(f"{child.name} ended with exit code {child.exit_code}: {' / '.join(list(child.tail)[-3:])}")

    def settle(self) -> None:
        """Waits until it does nothing more for requests that were given up, at most a while."""
        deadline = time.monotonic() + STOP_S
        while self._busy_cores(TAKT_S) > self.idle_cores + BUSY_CORES and time.monotonic() < deadline:
            pass

    def measure_idle(self) -> None:
        """Waits a moment."""
        time.sleep(SETTLE_S)
        self.idle_cores = self._busy_cores(IDLE_S)

    def _busy_cores(self, seconds: float) -> float:
        if not self.children:
            return 0.0
        before = cpu_s(self.children)
        time.sleep(seconds)
        return (cpu_s(self.children) - before) / seconds


def cpu_s(children: Sequence[Child]) -> float:
    """Processor seconds of all their processes that live, their descendants' included: a child leads its session."""
    sessions, total = {child.pid for child in children}, 0
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            fields = file.read_text().rpartition(")")[2].split()
            total += int(fields[11]) + int(fields[12]) if int(fields[3]) in sessions else 0
    return total / TICKS_PER_S


@contextlib.contextmanager
def started(want: Wanted, places: Places, timeout_s: float) -> Iterator[Server]:
    """Runs it until the block ends. Raises Died when it gives no token in time, Missing when it is not here."""
    if want.recipe is None:
        yield Server(want, by_url(want.name, want.url))
        return
    launch = RECIPES[want.recipe](places, _cores(), want.flags)
    server = Server(want, Target(want.name, launch.urls, launch.model), may_stop=launch.may_stop)
    with Logs(places.work / want.name) as lines:
        try:
            began = time.perf_counter()
            for process in launch.processes:
                environment = {**os.environ, **process.environment}
                server.children.append(Child(process.name, process.command, environment, process.cores, lines.hear))
            server.start_s = _wait(server, launch, began + timeout_s) - began
            launch.confirm()
            server.measure_idle()
            yield server
        finally:
            stop(server.children, STOP_S)


def _wait(server: Server, launch: Launch, deadline: float) -> float:
    """Until each of its URLs has given tokens: when the first of them came, in seconds of time.perf_counter."""
    came: list[float] = []
    began = time.perf_counter()
    for url in launch.urls:
        alone = Target(server.name, (url,), launch.model)
        while not (launch.complete() and (first := asyncio.run(_first_tokens(alone, deadline)))):
            server.check_alive()
            if time.perf_counter() > deadline:
                raise Died(f"{server.name} gave no token in time: {' / '.join(list(server.children[0].tail)[-3:])}")
            # To the hundredth of what it takes, and no closer: asking takes processor from the one that starts.
            time.sleep(max(POLL_S, (time.perf_counter() - began) / 100))
        came.append(first)
    return max(came)


async def _first_tokens(target: Target, deadline: float) -> float | None:
    async with open_session(max(1.0, deadline - time.perf_counter())) as session:
        answer = await stream(session, target, text_of(FIRST_PROMPT, str(time.perf_counter_ns())), FIRST_TOKENS)
        return answer.chunks[0] if answer.ok else None


def start_all(
    stack: contextlib.ExitStack, wants: Sequence[Wanted], places: Places, timeout_s: float
) -> tuple[list[Server], dict[str, str]]:
    """Starts one after the other, each paused once it answers, until `stack` is closed: the servers, and name → why of
    those that could not be had."""
    # A stopped process cannot hear that we are gone: whoever ends us must let us end it.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    servers: list[Server] = []
    absent: dict[str, str] = {}
    for want in wants:
        try:
            server = stack.enter_context(started(want, places, timeout_s))
        except (Died, Missing, OSError, RuntimeError) as error:
            absent[want.name] = str(error)
            print(f"{want.name} is left out: {error}", flush=True)
            continue
        server.pause()
        servers.append(server)
        print(f"{server.name}: {_told(server)}", flush=True)
    return servers, absent


def _told(server: Server) -> str:
    if server.start_s is None:
        return f"by URL, {', '.join(server.target.urls)}; it goes on while others are measured"
    stays = "stopped (SIGSTOP)" if server.may_stop else "left running"
    return (
        f"{server.start_s:.1f} s from start to first token; idle it takes {server.idle_cores:.3f} cores, "
        f"and is {stays} while others are measured"
    )


def add_arguments(parser: argparse.ArgumentParser, default: Sequence[str]) -> None:
    """What every bench of servers asks: which, and where they are."""
    place = os.environ.get
    parser.add_argument(
        "servers", nargs="*", type=wanted, default=[wanted(name) for name in default], help="see tests/bench/servers.py"
    )
    parser.add_argument("--model", default="smollm2", help="a GGUF file or a bundled name (default: %(default)s)")
    parser.add_argument("--vllm-python", default=place("BENCH_VLLM_PYTHON"), help="or BENCH_VLLM_PYTHON")
    parser.add_argument("--llama-server", default=place("BENCH_LLAMA_SERVER"), help="or BENCH_LLAMA_SERVER")
    parser.add_argument("--work", type=Path, default=Path("/tmp/tandem-bench"), help="for logs and converted weights")
    parser.add_argument("--start-timeout", type=float, default=600.0, metavar="S", help="default: %(default)s")
    parser.add_argument("--json", type=Path, help="write every figure there")
    parser.add_argument("--plot", type=Path, metavar="SVG", help="write a chart there")


def places_of(args: argparse.Namespace) -> Places:
    return Places(args.model, resolve(args.model), args.work, args.vllm_python, args.llama_server)


def _cores() -> list[int]:
    return sorted(os.sched_getaffinity(0))[:2]


def by_url(name: str, rest: str) -> Target:
    """`http://host:port[#model]`; without a model, the first that the server lists. Raises OSError, ValueError."""
    url, _, model = rest.partition("#")
    if not model:
        with urllib.request.urlopen(f"{url}/v1/models", timeout=10) as reply:
            model = json.load(reply)["data"][0]["id"]
    return Target(name, (url.rstrip("/"),), model)
