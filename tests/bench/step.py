"""Where the time of a step goes: schedule, build, forward, sample, update, send, and the look at what has come in.

    python -m tests.bench.step --streams 1 8 32

One engine core as it runs in its process, with its sockets, driven step by step in this one; medians over the steps.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import zmq

from engine.assembly import assemble
from engine.client import core_settings
from engine.config import EngineSettings
from engine.core import Request, SamplingParams
from engine.messages import Submit
from engine.process import CoreProcess, dial_api
from engine.run import local
from tests.bench.report import machine, table

PROMPT_TOKENS = 200
SETTLING_STEPS = 20  # prompts are read, buffers have grown
STEPS = 100
PARTS = ("schedule", "build", "forward", "sample", "update", "send", "read", "tick")
WISHES = {
    "greedy": {"temperature": 0.0},
    "top-p": {"temperature": 0.8, "top_p": 0.9},
}


class Stopwatch:
    """Seconds of each part, step by step."""

    def __init__(self) -> None:
        self._now: defaultdict[str, float] = defaultdict(float)
        self.steps: list[dict[str, float]] = []

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            began = time.perf_counter()
            result = function(*arguments)
            self._now[part] += time.perf_counter() - began
            return result

        return call

    def lap(self, whole: float) -> None:
        self.steps.append({**self._now, "step": whole})
        self._now.clear()

    def median_us(self, part: str) -> float:
        return 1e6 * statistics.median(step.get(part, 0.0) for step in self.steps[SETTLING_STEPS:])


class TimedModel:
    """A runnable model whose two calls are timed."""

    def __init__(self, model: Any, watch: Stopwatch) -> None:
        self._model = model
        self._forward = watch.timed("forward", model.__call__)
        self.sample = watch.timed("sample", model.sample)

    def __call__(self, batch: Any) -> Any:
        return self._forward(batch)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


class Core:
    """A core process's parts in this one, and the other end of its socket."""

    def __init__(self, model: str, directory: Path, threads: int | None) -> None:
        self.context = zmq.Context()
        address = f"ipc://{directory / 'api'}"
        self.api = self.context.socket(zmq.PAIR)
        self.api.bind(address)
        settings = core_settings(
            EngineSettings(model=model, num_threads=threads, kv_cache_memory="512MiB", max_draft_tokens=0)
        )
        self.parts = assemble(settings, self.context, "bench")
        self.process = CoreProcess(self.parts, dial_api(self.context, address), "bench")

    def close(self) -> None:
        self.parts.close()
        self.context.destroy(linger=0)

    def submit(self, number: int, wish: dict[str, float]) -> None:
        prompt = [(number * 131 + i * 7919) % 40_000 for i in range(PROMPT_TOKENS)]
        sampling = SamplingParams(max_tokens=10**6, seed=number, **wish)  # type: ignore[arg-type]
        request = Request(id=str(number), prompt=prompt, sampling=sampling)
        self.api.send(msgspec.msgpack.encode(Submit(request)))

    def drain(self) -> None:
        while self.api.poll(0):
            self.api.recv()


@contextmanager
def watched(core: Core) -> Iterator[Stopwatch]:
    """The parts' calls go through a stopwatch."""
    watch, engine, process = Stopwatch(), core.parts.engine, core.process
    places: list[tuple[Any, str, str]] = [
        (engine.scheduler, "schedule", "schedule"),
        (local, "batch_of", "build"),
        (engine, "_update", "update"),
        (process, "_flush", "send"),
        (process, "_poll", "read"),
        (process, "_tick", "tick"),
    ]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in places]
    model = engine.executor.model  # type: ignore[attr-defined]
    try:
        for owner, name, part in places:
            setattr(owner, name, watch.timed(part, getattr(owner, name)))
        engine.executor.model = TimedModel(model, watch)  # type: ignore[attr-defined]
        yield watch
    finally:
        engine.executor.model = model  # type: ignore[attr-defined]
        for owner, name, function in before:
            setattr(owner, name, function)


def measure(core: Core, streams: int, wish: dict[str, float]) -> Stopwatch:
    """So many streams, until enough steps are seen; then they are aborted."""
    for number in range(streams):
        core.submit(number, wish)
    with watched(core) as watch:
        core.process._poll(1000)
        while len(watch.steps) < SETTLING_STEPS + STEPS:
            began = time.perf_counter()
            busy = core.parts.engine.step()
            core.process._flush()
            core.process._poll(0)
            core.process._tick(busy)
            watch.lap(time.perf_counter() - began)
            core.drain()
    for number in range(streams):
        core.parts.engine.abort(str(number))
    return watch


def row(name: str, watch: Stopwatch) -> list[str]:
    """Microseconds of each part, and the share of the step that is not the forward pass."""
    whole, forward = watch.median_us("step"), watch.median_us("forward")
    parts = [f"{watch.median_us(part):,.0f}" for part in PARTS]
    return [name, *parts, f"{whole:,.0f}", f"{1 - forward / whole:.1%}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32], help="(default: 1 8 32)")
    parser.add_argument("--threads", type=int, help="of the forward pass; unset: one for each core")
    arguments = parser.parse_args()
    lines = []
    with tempfile.TemporaryDirectory() as directory:
        core = Core(arguments.model, Path(directory), arguments.threads)
        try:
            for name, wish in WISHES.items():
                for streams in arguments.streams:
                    lines.append(row(f"{streams}, {name}", measure(core, streams, wish)))
        finally:
            core.close()
    print(f"{machine()}; microseconds, medians of {STEPS} steps\n")
    print(table(["streams", *PARTS, "step", "not forward"], lines))


if __name__ == "__main__":
    main()
