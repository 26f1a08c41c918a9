"""Speed of whole servers, on the same work in the same run: steps of streams and chats, prompts to the first token.

    python -m tests.bench.engine                                     one hybrid engine on every core
    python -m tests.bench.engine hybrid "q4=hybrid --quantization auto" vllm llama.cpp --plot docs/figures/engine.svg
    python -m tests.bench.engine hybrid pair other=http://127.0.0.1:8001

Servers are named as tests/bench/servers.py says. Every round does each piece of work once on each server, in turn and
in a new order, so that a noisy machine is noisy to all; those that are not asked are stopped where they may be. Figures
are medians over rounds; ratios are the median of the rounds' own ratios. The floor is what the bytes of weights and KV
take at the memory bandwidth, or the products at the bfloat16 rate, the longer of the two; both are measured each round.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path

from engine.models.config import ModelConfig
from engine.models.gguf_config import read_gguf_config
from engine.models.gguf_file import read_gguf
from engine.models.resolve import resolve
from tests.bench.floor import BITS_16, Machine, Probe, num_weights
from tests.bench.plot import Panel, bars
from tests.bench.report import machine, table
from tests.bench.servers import Died, Server, Wanted, add_arguments, places_of, start_all
from tests.bench.work import WORK, Work

PROBES = 3
FLOOR_16, FLOOR_PACKED = "floor bf16", "floor packed"


@dataclass
class Figures:
    """Of one server, or of a floor: work name → round → its value."""

    values: dict[str, dict[int, float]] = field(default_factory=dict)

    def add(self, work: str, number: int, value: float) -> None:
        self.values.setdefault(work, {})[number] = value

    def median(self, work: str) -> float | None:
        found = self.values.get(work)
        return statistics.median(found.values()) if found else None

    def ratio(self, other: Figures, work: str) -> float | None:
        """The median of ours by theirs, over the rounds that both have."""
        own, theirs = self.values.get(work, {}), other.values.get(work, {})
        common = [own[number] / theirs[number] for number in own.keys() & theirs.keys()]
        return statistics.median(common) if common else None


@dataclass
class Bench:
    """What is measured, and what came of it."""

    servers: list[Server]
    config: ModelConfig
    packed_bytes: float  # a weight, in the checkpoint as it is
    figures: dict[str, Figures]  # of the servers and the floors
    machines: list[Machine] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)

    def round(self, number: int, work: Work) -> None:
        """Round 0 warms up. Begins with another server each time."""
        if number:
            self._probe(number, work)
        turn = number % max(1, len(self.servers))
        for server in [*self.servers[turn:], *self.servers[:turn]]:
            try:
                value = self._measured(server, work, number)
            except (Died, RuntimeError) as error:
                self._fail(server, f"{work.name}: {error}")
                continue
            if number:
                self.figures[server.name].add(work.name, number, value)

    def _measured(self, server: Server, work: Work, number: int) -> float:
        server.resume()
        try:
            server.check_alive()
            return work.figure(server.target, str(number))
        finally:
            server.pause()

    def _fail(self, server: Server, why: str) -> None:
        """It is asked no more."""
        print(f"{server.name} is left out from here on: {why}", flush=True)
        self.failures[server.name] = why
        self.servers.remove(server)

    def _probe(self, number: int, work: Work) -> None:
        """The floors of this round, as near to the work as can be."""
        probe = Probe()
        for _ in range(PROBES):
            probe.measure()
        self.machines.append(probe.machine)
        for name, size in ((FLOOR_16, BITS_16), (FLOOR_PACKED, self.packed_bytes)):
            self.figures[name].add(work.name, number, work.scale * probe.machine.floor_s(work.case, self.config, size))


def bench_of(servers: list[Server], model: str) -> Bench:
    file = read_gguf(resolve(model))
    config = read_gguf_config(file)
    packed = sum(tensor.rows.nbytes for tensor in file.tensors.values())
    names = [*(server.name for server in servers), FLOOR_16, FLOOR_PACKED]
    return Bench(list(servers), config, packed / num_weights(config), {name: Figures() for name in names})


def medians(bench: Bench) -> list[list[str]]:
    lines = []
    for work in WORK:
        cells = [figures.median(work.name) for figures in bench.figures.values()]
        lines.append([work.name, work.unit, *("–" if cell is None else f"{cell:.3g}" for cell in cells)])
    return lines


def ratios(bench: Bench, wants: list[Wanted]) -> list[list[str]]:
    """Ours by each peer and by the best of them, and the floors by everyone: the share of the floor that is reached."""
    figures = bench.figures
    peers = [want.name for want in wants if not want.is_ours and want.name in figures]
    lines = []
    for want in wants:
        if want.name not in figures:
            continue
        of = figures[want.name]
        if want.is_ours and peers:
            columns = [[of.ratio(figures[peer], work.name) for work in WORK] for peer in peers]
            lines += [_line(f"{want.name} / {peer}", column) for peer, column in zip(peers, columns, strict=True)]
            best = [max((ratio for ratio in row if ratio), default=None) for row in zip(*columns, strict=True)]
            lines.append(_line(f"{want.name} / the best peer", best))
        for floor in (FLOOR_16, FLOOR_PACKED):
            lines.append(_line(f"{floor} / {want.name}", [figures[floor].ratio(of, work.name) for work in WORK]))
    return lines


def _line(name: str, ratios: list[float | None]) -> list[str]:
    return [name, *("–" if ratio is None else f"{ratio:.2f}" for ratio in ratios)]


def conditions(bench: Bench, args: argparse.Namespace) -> str:
    """One paragraph: what a reader must know before believing the tables."""
    read = [one.read / 1e9 for one in bench.machines]
    products = [one.products / 1e9 for one in bench.machines]
    return (
        f"{machine()}. Medians of {args.rounds} rounds, servers in turn. Memory read at {statistics.median(read):.0f} "
        f"GB/s ({min(read):.0f} to {max(read):.0f}), bfloat16 products at {statistics.median(products):.0f} GFLOP/s "
        f"({min(products):.0f} to {max(products):.0f}); the checkpoint has {8 * bench.packed_bytes:.1f} bits a weight."
    )


def main() -> None:
    args = parse()
    with contextlib.ExitStack() as stack:
        servers, absent = start_all(stack, args.servers, places_of(args), args.start_timeout)
        starts = {server.name: server.start_s for server in servers}
        bench = bench_of(servers, args.model)
        for number in range(args.rounds + 1):
            for work in WORK:
                bench.round(number, work)
            print(f"round {number} of {args.rounds} done" if number else "warmed up", flush=True)
    print(f"\n{conditions(bench, args)}\n")
    print(table(["work", "unit", *bench.figures], medians(bench)), "\n")
    print(table(["ratio", *(work.name for work in WORK)], ratios(bench, args.servers)), "\n")
    print(table(["start to first token", "s"], [[name, f"{s:.1f}"] for name, s in starts.items() if s]))
    for name, why in (absent | bench.failures).items():
        print(f"\n{name}: {why}")
    if args.json:
        values = {name: figures.values for name, figures in bench.figures.items()}
        args.json.write_text(json.dumps({"values": values, "start_s": starts}, indent=1))
    if args.plot:
        draw(args.plot, bench, starts)


def draw(path: Path, bench: Bench, starts: dict[str, float | None]) -> None:
    panels = [
        Panel(work.name, work.unit, {name: one.median(work.name) for name, one in bench.figures.items()})
        for work in WORK
    ]
    bars(path, [*panels, Panel("start", "s to first token", {name: starts.get(name) for name in bench.figures})])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, ["hybrid"])
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds (default: %(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
