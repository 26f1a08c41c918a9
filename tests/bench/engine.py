"""Speed of whole servers, on the same work in the same run: ms per step for 1, 8 and 32 streams, and long prompts.

    python -m tests.bench.engine                                     one hybrid engine on every core
    python -m tests.bench.engine --ours hybrid pair --url vllm=http://127.0.0.1:8001
    python -m tests.bench.engine --json figures.json --plot engine.png

Every round does each piece of work once on each server, in turn, so that a noisy machine is noisy to all. Figures are
medians over rounds; ratios are the median of the rounds' own ratios, against the first server of the table.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

from tests.bench.load import Answer, Target, open_session, streams, text_of
from tests.bench.report import machine, plot_bars, table
from tests.bench.servers import by_url, plans, started

STREAM_PROMPT = 64  # words
STREAM_TOKENS = 48


@dataclass(frozen=True, slots=True)
class Work:
    """One kind of measurement; `measure` gives the figure of one round."""

    name: str
    unit: str
    measure: Callable[[aiohttp.ClientSession, Target, int], Coroutine[None, None, float]]


@dataclass
class Figures:
    """Of one server: work name -> one value a round."""

    values: dict[str, list[float]] = field(default_factory=dict)

    def median(self, work: str) -> float:
        return statistics.median(self.values[work])


def decoding(num_streams: int) -> Work:
    async def measure(session: aiohttp.ClientSession, target: Target, seed: int) -> float:
        prompts = [text_of(STREAM_PROMPT, seed * 1000 + index) for index in range(num_streams)]
        answers = await streams(session, target, prompts, STREAM_TOKENS)
        return 1e3 * statistics.median(answer.seconds_per_token for answer in succeeded(answers))

    return Work(f"{num_streams} stream{'s' if num_streams > 1 else ''}", "ms per token", measure)


def reading(num_words: int) -> Work:
    async def measure(session: aiohttp.ClientSession, target: Target, seed: int) -> float:
        answers = await streams(session, target, [text_of(num_words, seed)], 2)
        return succeeded(answers)[0].ttft

    return Work(f"{num_words}-token prompt", "s to first token", measure)


def succeeded(answers: list[Answer]) -> list[Answer]:
    failed = [answer.error for answer in answers if answer.error]
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(answers)} requests failed: {failed[0]}")
    return answers


WORK = [decoding(1), decoding(8), decoding(32), reading(20), reading(512), reading(2048)]


async def measure_all(targets: list[Target], rounds: int) -> dict[str, Figures]:
    figures = {target.name: Figures() for target in targets}
    async with open_session() as session:
        for number in range(rounds + 1):  # the first warms up
            for work in WORK:
                for target in targets:
                    value = await work.measure(session, target, seed=number * 100 + 7)
                    if number > 0:
                        figures[target.name].values.setdefault(work.name, []).append(value)
            print(f"round {number} of {rounds} done" if number else "warmed up", flush=True)
    return figures


def rows(figures: dict[str, Figures]) -> list[list[str]]:
    first = next(iter(figures.values()))
    lines = []
    for work in WORK:
        cells = [work.name, work.unit]
        for one in figures.values():
            pairs = zip(one.values[work.name], first.values[work.name], strict=True)
            ratio = statistics.median(mine / theirs for mine, theirs in pairs)
            cells.append(f"{one.median(work.name):.3g}" + ("" if one is first else f"  ({ratio:.2f}x)"))
        lines.append(cells)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ours", nargs="*", default=["hybrid"], choices=list(plans()), help="our clusters to start")
    parser.add_argument("--url", action="append", default=[], metavar="NAME=URL[#MODEL]", help="any OpenAI server")
    parser.add_argument("--model", default="smollm2", help="what ours serve (default: %(default)s)")
    parser.add_argument("--flags", default="", help="further engine flags, in one string")
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds (default: %(default)s)")
    parser.add_argument("--logs", type=Path, default=Path("/tmp/tandem-bench"), help="folder for our servers' logs")
    parser.add_argument("--json", type=Path, help="write every figure there")
    parser.add_argument("--plot", type=Path, help="write a bar chart there (needs matplotlib)")
    args = parser.parse_args()
    with contextlib.ExitStack() as stack:
        targets = []
        for name in args.ours:
            running = started(plans()[name], args.model, args.flags.split(), args.logs)
            target, start_s = stack.enter_context(running)
            print(f"{target.name}: {start_s:.1f} s from start to a completion through every role")
            targets.append(target)
        targets += [by_url(named) for named in args.url]
        figures = asyncio.run(measure_all(targets, args.rounds))
    print(f"\n{machine()}; medians of {args.rounds} rounds\n")
    print(table(["work", "unit", *figures], rows(figures)))
    if args.json:
        args.json.write_text(json.dumps({name: one.values for name, one in figures.items()}, indent=1))
    if args.plot:
        bars = {name: [one.median(work.name) for work in WORK] for name, one in figures.items()}
        plot_bars(args.plot, [f"{work.name}\n({work.unit})" for work in WORK], bars)


if __name__ == "__main__":
    main()
