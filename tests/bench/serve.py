"""What users feel under mixed traffic: a few steady chats and short questions, while long prompts keep arriving.

    python -m tests.bench.serve                                      our pair, two hybrids, one hybrid
    python -m tests.bench.serve pair vllm vllm-two vllm-pd --rates 0.25 0.5 1 --plot docs/figures/goodput.svg
    python -m tests.bench.serve pair other=http://127.0.0.1:8001

Servers are named as tests/bench/servers.py says. In every round each of them gets the chats alone, the undisturbed
figures, and then the same timetable of chats, short questions and long prompts (tests/bench/traffic.py), in turn and in
a new order each round; those that are not asked are stopped where they may be. A good answer had its first token within
--ttft (--long-ttft for a long prompt) and no gap above --gap; good by the mean, when only its mean gap was within
--mean-gap. Good answers are counted per second of timetable, so that none is better than what was offered.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tests.bench.load import Answer
from tests.bench.plot import lines
from tests.bench.report import machine, table
from tests.bench.servers import Died, Server, add_arguments, places_of, start_all
from tests.bench.traffic import LONG_WORDS, Kind, Load, Seen, offer

OURS = ("pair", "two-hybrids", "hybrid")
WARM_UP = Load(1, 2.0, 8, 1.0, 1.0, 3.0)


@dataclass(frozen=True, slots=True)
class Objective:
    """What makes an answer good."""

    ttft_s: float
    long_ttft_s: float
    gap_s: float
    mean_gap_s: float

    def good(self, seen: Seen, gap: Callable[[Answer], float], limit_s: float) -> int:
        in_time = [one for one in seen.of("chat", "short") if one.ttft <= self.ttft_s]
        in_time += [one for one in seen.of("long") if one.ttft <= self.long_ttft_s]
        return sum(gap(one) <= limit_s for one in in_time)

    def good_by_worst(self, seen: Seen) -> int:
        return self.good(seen, lambda one: max(one.gaps, default=0.0), self.gap_s)

    def good_by_mean(self, seen: Seen) -> int:
        return self.good(seen, lambda one: one.seconds_per_token, self.mean_gap_s)


@dataclass
class Measured:
    """Of one server at one rate, round after round: the chats alone, and everything."""

    alone: list[Seen] = field(default_factory=list)
    mixed: list[Seen] = field(default_factory=list)

    @property
    def worst_ratio(self) -> float:
        """The median of the rounds' own ratios of worst gaps, of chats as long and as many."""
        pairs = zip(self.alone, self.mixed, strict=True)
        return statistics.median(max(gaps_ms([mixed])) / max(gaps_ms([alone])) for alone, mixed in pairs)

    @property
    def offered_per_s(self) -> float:
        return sum(seen.offered for seen in self.mixed) / sum(seen.seconds for seen in self.mixed)

    def per_s(self, count: Callable[[Seen], int]) -> float:
        return sum(map(count, self.mixed)) / sum(seen.seconds for seen in self.mixed)


def gaps_ms(rounds: Sequence[Seen]) -> list[float]:
    """Between two chunks of a chat's answer. Not a number where nothing was answered."""
    found = [1e3 * gap for seen in rounds for answer in seen.of("chat") for gap in answer.gaps]
    return found or [float("nan")]


def ttfts_ms(rounds: Sequence[Seen], *kinds: Kind) -> list[float]:
    return [1e3 * answer.ttft for seen in rounds for answer in seen.of(*kinds)] or [float("nan")]


def percentiles(values: list[float], *shares: float) -> str:
    ordered = sorted(values)
    return " / ".join(f"{ordered[min(int(share * len(ordered)), len(ordered) - 1)]:.0f}" for share in shares)


HEADER = [
    "server",
    "chat gap ms p50 / p99 / worst",
    "undisturbed",
    "worst ratio",
    "short TTFT ms p50 / p99",
    "long TTFT ms p50 / p99",
    "good answers per s",
    "good by the mean",
    "failed, missed",
]


def row(name: str, measured: Measured, objective: Objective) -> list[str]:
    mixed, all_of_them = measured.mixed, (0.5, 0.99, 1.0)
    return [
        name,
        percentiles(gaps_ms(mixed), *all_of_them),
        percentiles(gaps_ms(measured.alone), *all_of_them),
        f"{measured.worst_ratio:.2f}",
        percentiles(ttfts_ms(mixed, "chat", "short"), 0.5, 0.99),
        percentiles(ttfts_ms(mixed, "long"), 0.5, 0.99),
        f"{measured.per_s(objective.good_by_worst):.2f}",
        f"{measured.per_s(objective.good_by_mean):.2f}",
        f"{sum(seen.failed for seen in mixed)}, {sum(seen.missed for seen in mixed)}",
    ]


@dataclass
class Bench:
    servers: list[Server]
    args: argparse.Namespace
    measured: dict[float, dict[str, Measured]] = field(default_factory=dict)  # rate → server → what was seen
    alone: dict[tuple[str, int], Seen] = field(default_factory=dict)  # the chats' of a round, whatever its rates
    failures: dict[str, str] = field(default_factory=dict)

    def round(self, number: int) -> None:
        """Every rate on every server; begins with another server each time."""
        turn = number % max(1, len(self.servers))
        for rate in self.args.rates:
            for server in [*self.servers[turn:], *self.servers[:turn]]:
                try:
                    self._measure(server, rate, number)
                except (Died, RuntimeError) as error:
                    print(f"{server.name} is left out from here on: {error}", flush=True)
                    self.failures[server.name] = str(error)
                    self.servers.remove(server)

    def _measure(self, server: Server, rate: float, number: int) -> None:
        load, seed = load_of(self.args, rate), str(number)
        server.resume()
        try:
            self._offer(server, WARM_UP, f"warm {rate} {number}")
            if (server.name, number) not in self.alone:
                self.alone[server.name, number] = self._offer(server, load.chats_alone, seed)
            mixed = self._offer(server, load, seed)
        finally:
            server.pause()
        measured = self.measured.setdefault(rate, {}).setdefault(server.name, Measured())
        measured.alone.append(self.alone[server.name, number])
        measured.mixed.append(mixed)

    def _offer(self, server: Server, load: Load, seed: str) -> Seen:
        """Raises RuntimeError when none of the chats was answered: such a server does not run."""
        server.check_alive()
        seen = asyncio.run(offer(server.target, load, seed, self.args.patience))
        server.check_alive()
        server.settle()
        if not seen.of("chat"):
            raise RuntimeError(f"no chat was answered: {next(answer.error for _, answer in seen.answers)}")
        return seen


def load_of(args: argparse.Namespace, rate: float) -> Load:
    return Load(args.chats, args.chat_every, args.chat_tokens, args.short_per_long * rate, rate, args.seconds)


def goodput(bench: Bench, objective: Objective) -> dict[str, list[tuple[float, float]]]:
    """Server → (answers offered per s, good ones per s), by rising rate."""
    points: dict[str, list[tuple[float, float]]] = {}
    for rate in sorted(bench.measured):
        for name, measured in bench.measured[rate].items():
            point = (measured.offered_per_s, measured.per_s(objective.good_by_worst))
            points.setdefault(name, []).append(point)
    return points


def main() -> None:
    args = parse()
    objective = Objective(args.ttft / 1e3, args.long_ttft / 1e3, args.gap / 1e3, args.mean_gap / 1e3)
    with contextlib.ExitStack() as stack:
        servers, absent = start_all(stack, args.servers, places_of(args), args.start_timeout)
        bench = Bench(list(servers), args)
        for number in range(args.rounds):
            bench.round(number)
            print(f"round {number + 1} of {args.rounds} done", flush=True)
    report(bench, objective)
    for name, why in (absent | bench.failures).items():
        print(f"\n{name}: {why}")
    if args.json:
        args.json.write_text(json.dumps(raw(bench)))
    points = goodput(bench, objective)
    if args.plot and points:
        lines(args.plot, "Good answers per second", "answers offered per second", "good ones per second", points)


def report(bench: Bench, objective: Objective) -> None:
    args = bench.args
    print(
        f"\n{machine()}. {args.rounds} rounds of {args.seconds:g} s, servers in turn. {args.chats} chats, a turn of "
        f"{args.chat_tokens} tokens every {args.chat_every:g} s each. Good: first token within {args.ttft:g} ms "
        f"({args.long_ttft:g} ms of a long prompt), no gap above {args.gap:g} ms; by the mean: {args.mean_gap:g} ms."
    )
    for rate, of in sorted(bench.measured.items()):
        offered = statistics.mean(measured.offered_per_s for measured in of.values())
        print(
            f"\n{rate:g} prompts of {LONG_WORDS:,} tokens and {args.short_per_long * rate:g} short questions per s; "
            f"{offered:.2f} answers offered per s\n"
        )
        print(table(HEADER, [row(name, measured, objective) for name, measured in of.items()]))


def raw(bench: Bench) -> dict[str, object]:
    """Rate → server → round → answers: [kind, second of the round, TTFT, gaps] or [kind, second, error]."""

    def told(seen: Seen) -> list[list[object]]:
        return [
            [arrival.kind, arrival.at_s, *((answer.ttft, answer.gaps) if answer.ok else (answer.error,))]
            for arrival, answer in seen.answers
        ]

    return {
        f"{rate:g}": {
            name: {"alone": list(map(told, measured.alone)), "mixed": list(map(told, measured.mixed))}
            for name, measured in of.items()
        }
        for rate, of in bench.measured.items()
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, OURS)
    told = "default: %(default)s"
    parser.add_argument("--rates", type=float, nargs="+", default=[0.5], help=f"long prompts per s, each; {told}")
    parser.add_argument("--short-per-long", type=float, default=2.0, help=f"short questions per long prompt; {told}")
    parser.add_argument("--chats", type=int, default=3, help=told)
    parser.add_argument("--chat-every", type=float, default=2.5, metavar="S", help=f"between a chat's turns; {told}")
    parser.add_argument("--chat-tokens", type=int, default=64, help=f"of each of its answers; {told}")
    parser.add_argument("--seconds", type=float, default=20.0, help=f"of a round's timetable; {told}")
    parser.add_argument("--rounds", type=int, default=3, help=told)
    parser.add_argument("--ttft", type=float, default=1000.0, metavar="MS", help=f"of a good answer; {told}")
    parser.add_argument("--long-ttft", type=float, default=3000.0, metavar="MS", help=f"of a long prompt's; {told}")
    parser.add_argument("--gap", type=float, default=100.0, metavar="MS", help=f"worst of a good answer; {told}")
    parser.add_argument("--mean-gap", type=float, default=50.0, metavar="MS", help=f"if good by the mean; {told}")
    parser.add_argument("--patience", type=float, default=30.0, metavar="S", help=f"longest of a request; {told}")
    args = parser.parse_args()
    if args.chats < 1:
        parser.error("--chats: at least one, or there are no gaps to look at")
    return args


if __name__ == "__main__":
    main()
