"""What users feel under mixed traffic: a few steady chats while long prompts keep arriving.

    python -m tests.bench.serve                                      our pair, two hybrids, one hybrid
    python -m tests.bench.serve --url vllm=http://127.0.0.1:8001 --ours pair

Every server gets the same traffic, in turn, for several rounds: `--chats` clients that each ask a short question, read
the answer to its end and ask the next; and long prompts that arrive on their own clock, answered or not. Before it, the
chats alone: the undisturbed figures. A good answer had its first token within `--ttft` and no gap above `--gap`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

from tests.bench.load import Answer, Target, open_session, stream, text_of
from tests.bench.report import machine, table
from tests.bench.servers import by_url, plans, started

SHORT_WORDS = 24
LONG_WORDS = 1000
LONG_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Traffic:
    chats: int
    chat_tokens: int
    long_every_s: float  # mean of an exponential distribution; 0: no long prompts
    seconds: float


@dataclass
class Seen:
    """All that one server answered."""

    short: list[Answer] = field(default_factory=list)
    long: list[Answer] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, other: Seen) -> None:
        self.short += other.short
        self.long += other.long
        self.seconds += other.seconds

    @property
    def failed(self) -> int:
        return sum(answer.error is not None for answer in self.short + self.long)

    def gaps_ms(self) -> list[float]:
        return [1e3 * gap for answer in self.short for gap in answer.gaps]

    def good_per_s(self, ttft_s: float, gap_s: float) -> float:
        answered = [answer for answer in self.short + self.long if answer.error is None]
        good = [one for one in answered if one.ttft <= ttft_s and max(one.gaps, default=0.0) <= gap_s]
        return len(good) / self.seconds


async def offer(target: Target, traffic: Traffic, seed: int) -> Seen:
    """The traffic of one round; ends when the last answer that began in time has ended."""
    seen = Seen()
    began = time.perf_counter()
    until = began + traffic.seconds
    async with open_session() as session:
        chats = [_chat(session, target, traffic, until, seen, seed * 100 + index) for index in range(traffic.chats)]
        await asyncio.gather(*chats, _long_prompts(session, target, traffic, until, seen, seed))
    seen.seconds = time.perf_counter() - began
    return seen


async def _chat(
    session: aiohttp.ClientSession, target: Target, traffic: Traffic, until: float, seen: Seen, seed: int
) -> None:
    turn = 0
    while time.perf_counter() < until:
        turn += 1
        prompt = text_of(SHORT_WORDS, seed * 10_000 + turn)
        seen.short.append(await stream(session, target, prompt, traffic.chat_tokens))


async def _long_prompts(
    session: aiohttp.ClientSession, target: Target, traffic: Traffic, until: float, seen: Seen, seed: int
) -> None:
    chance, number = random.Random(seed), 0
    async with asyncio.TaskGroup() as group:
        while traffic.long_every_s:
            await asyncio.sleep(chance.expovariate(1 / traffic.long_every_s))
            if time.perf_counter() >= until:
                return
            number += 1
            group.create_task(_long_prompt(session, target, text_of(LONG_WORDS, seed * 10_000 + number), seen))


async def _long_prompt(session: aiohttp.ClientSession, target: Target, prompt: str, seen: Seen) -> None:
    seen.long.append(await stream(session, target, prompt, LONG_TOKENS))


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(int(share * len(values)), len(values) - 1)] if values else float("nan")


def row(name: str, alone: Seen, mixed: Seen, args: argparse.Namespace) -> list[str]:
    gaps, quiet = mixed.gaps_ms(), alone.gaps_ms()
    short = [1e3 * answer.ttft for answer in mixed.short if answer.error is None]
    long = [1e3 * answer.ttft for answer in mixed.long if answer.error is None]
    return [
        name,
        f"{percentile(gaps, 0.5):.0f} / {percentile(gaps, 0.99):.0f} / {max(gaps):.0f}",
        f"{percentile(quiet, 0.5):.0f} / {percentile(quiet, 0.99):.0f} / {max(quiet):.0f}",
        f"{max(gaps) / max(quiet):.2f}",
        f"{percentile(short, 0.5):.0f} / {percentile(short, 0.99):.0f}",
        f"{percentile(long, 0.5):.0f} / {percentile(long, 0.99):.0f}",
        f"{mixed.good_per_s(args.ttft / 1e3, args.gap / 1e3):.2f}",
        str(mixed.failed),
    ]


HEADER = [
    "server",
    "gap ms p50 / p99 / worst",
    "the same undisturbed",
    "worst ratio",
    "short TTFT ms p50 / p99",
    "long TTFT ms p50 / p99",
    "good answers per s",
    "failed",
]


def measure(target: Target, args: argparse.Namespace) -> tuple[Seen, Seen]:
    """Chats alone, then mixed."""
    alone, mixed = Seen(), Seen()
    quiet = Traffic(args.chats, args.chat_tokens, 0.0, args.seconds / 2)
    busy = Traffic(args.chats, args.chat_tokens, args.long_every, args.seconds)
    asyncio.run(offer(target, Traffic(1, 8, 0.0, 1.0), seed=999))  # warm-up
    for number in range(args.rounds):
        alone.add(asyncio.run(offer(target, quiet, seed=2 * number + 1)))
        mixed.add(asyncio.run(offer(target, busy, seed=2 * number + 2)))
    return alone, mixed


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ours", nargs="*", default=list(plans()), choices=list(plans()), help="our clusters")
    parser.add_argument("--url", action="append", default=[], metavar="NAME=URL[#MODEL]", help="any OpenAI server")
    parser.add_argument("--model", default="smollm2", help="what ours serve (default: %(default)s)")
    parser.add_argument("--flags", default="", help="further engine flags, in one string")
    parser.add_argument("--chats", type=int, default=3, help="steady chats (default: %(default)s)")
    parser.add_argument("--chat-tokens", type=int, default=64, help="tokens of each answer (default: %(default)s)")
    parser.add_argument("--long-every", type=float, default=2.0, help="mean s between long prompts (%(default)s)")
    parser.add_argument("--seconds", type=float, default=20.0, help="of mixed traffic a round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--ttft", type=float, default=1000.0, help="ms, of a good answer (default: %(default)s)")
    parser.add_argument("--gap", type=float, default=100.0, help="ms, of a good answer (default: %(default)s)")
    parser.add_argument("--logs", type=Path, default=Path("/tmp/tandem-bench"), help="folder for our servers' logs")
    parser.add_argument("--json", type=Path, help="write every answer's times there")
    return parser.parse_args()


def main() -> None:
    args = parse()
    lines, raw = [], {}
    for name in args.ours:
        # One at a time: an idle server's pool and threads are still neighbours.
        with started(plans()[name], args.model, args.flags.split(), args.logs) as (target, _):
            seen = measure(target, args)
        lines.append(row(target.name, *seen, args))
        raw[target.name] = _raw(seen[1])
        print(f"{target.name} done", flush=True)
    for named in args.url:
        target = by_url(named)
        seen = measure(target, args)
        lines.append(row(target.name, *seen, args))
        raw[target.name] = _raw(seen[1])
    print(f"\n{machine()}; {args.chats} chats, a {LONG_WORDS}-token prompt every {args.long_every} s\n")
    print(table(HEADER, lines))
    if args.json:
        args.json.write_text(json.dumps(raw))


def _raw(seen: Seen) -> dict[str, list[list[float]]]:
    kinds = {"short": seen.short, "long": seen.long}
    return {kind: [[one.ttft, *one.gaps] for one in answers if one.error is None] for kind, answers in kinds.items()}


if __name__ == "__main__":
    main()
