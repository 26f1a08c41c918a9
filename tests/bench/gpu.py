"""Steps of an engine on an NVIDIA card against that card: `python -m tests.bench.gpu`.

Each round measures, one after the other, how fast the card reads memory, how fast it multiplies bfloat16 matrices, and
how long a step takes: on the card alone, and in all, from its sequences to its sampled tokens on the host. The floor of
a step is the larger of its bytes by the first and its flops by the second. The least of all rounds counts. The last
lines are a table with one row, for docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version

import torch

from engine.attention.metadata import batch_of
from engine.core import Request, SamplingParams, Sequence, Step
from engine.run.local import LocalExecutor
from tests.bench.floor import Case, Probe, Times
from tests.bench.report import table

READ_BYTES = 1 << 30  # far more than any card's cache
MATRIX = 8192
BLOCK_SIZE = 16
CONTEXT = 200
WARM_STEPS = 3
QUERY_TIMEOUT_S = 20.0

CASES = (
    Case("1 stream", 1, 1, CONTEXT),
    Case("8 streams", 8, 1, CONTEXT),
    Case("32 streams", 32, 1, CONTEXT),
    Case("128 streams", 128, 1, CONTEXT),
    Case("512-token prompt", 1, 512, 0),
    Case("2,048-token prompt", 1, 2048, 0),
)
MOST_ROWS = max(case.num_rows for case in CASES)
NUM_BLOCKS = max(case.num_rows * -(-(case.context + case.num_new) // BLOCK_SIZE) for case in CASES)


def step_for(case: Case) -> Step:
    rows, blocks = [], iter(range(NUM_BLOCKS))
    for row in range(case.num_rows):
        tokens = [100 + (row * 131 + i * 7919) % 20_000 for i in range(case.context + case.num_new)]
        request = Request(id=str(row), prompt=tokens, sampling=SamplingParams(max_tokens=1, seed=row, temperature=0.0))
        sequence = Sequence.of(request, arrival=0.0)
        sequence.num_computed = case.context
        sequence.block_table = [next(blocks) for _ in range(-(-len(tokens) // BLOCK_SIZE))]
        rows.append(sequence)
    return Step(rows, [case.num_new] * case.num_rows)


@dataclass
class CardTimes(Times):
    """Seconds that the card itself took."""

    def measure(self, call: Callable[[], object]) -> None:
        began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        began.record()
        call()
        ended.record()
        ended.synchronize()
        self.seconds.append(began.elapsed_time(ended) / 1e3)


@dataclass
class CardProbe(Probe):
    memory: torch.Tensor = field(default_factory=lambda: torch.ones(READ_BYTES // 4, device="cuda"))
    matrix: torch.Tensor = field(
        default_factory=lambda: torch.randn(MATRIX, MATRIX, dtype=torch.bfloat16, device="cuda")
    )
    read: Times = field(default_factory=CardTimes)
    product: Times = field(default_factory=CardTimes)


@dataclass(frozen=True, slots=True)
class Figure:
    """The least of one case, in seconds."""

    case: Case
    step: float
    card: float
    floor: float


def figure_of(case: Case, executor: LocalExecutor, probe: CardProbe, rounds: int) -> Figure:
    step = step_for(case)
    batch = batch_of(step, BLOCK_SIZE)
    for _ in range(WARM_STEPS):
        executor.execute(step)
    whole, card = Times(), CardTimes()
    for _ in range(rounds):
        probe.measure()
        card.measure(lambda: executor.model(batch))
        torch.cuda.synchronize()
        whole.measure(lambda: executor.execute(step))
    return Figure(case, whole.least, card.least, probe.machine.floor_s(case, executor.model.config))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2", help="as for the engine")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(1, "there is no NVIDIA card here, or torch is not CUDA's\n")
    executor = LocalExecutor(
        arguments.model, dtype=arguments.dtype, device="cuda", block_size=BLOCK_SIZE, max_num_seqs=MOST_ROWS
    )
    executor.attach(bytearray(executor.layout(NUM_BLOCKS).pool_bytes))
    executor.warm_up()
    probe = CardProbe()
    figures = [figure_of(case, executor, probe, arguments.rounds) for case in CASES]
    print(f"{card_line()}; {software_line()}")
    print(f"{arguments.model}, {type(executor.model).__name__}, {executor.model.place.dtype}, context {CONTEXT}")
    print(f"measured: {probe.machine.read / 1e9:.0f} GB/s, {probe.machine.products / 1e12:.0f} TFLOP/s\n")
    print(table(("", "step", "on the card", "floor", "share of the floor"), [row_of(figure) for figure in figures]))
    print(f"\nFor docs/benchmarks.md, steps with their share of the floor:\n\n{summary(arguments.model, figures)}")


def row_of(figure: Figure) -> tuple[str, ...]:
    times = [f"{seconds * 1e3:.3f} ms" for seconds in (figure.step, figure.card, figure.floor)]
    return (figure.case.name, *times, f"{figure.floor / figure.step:.0%}")


def summary(model: str, figures: list[Figure]) -> str:
    header = ["card and software", "model", *(figure.case.name for figure in figures)]
    cells = [f"{figure.step * 1e3:.2f} ms ({figure.floor / figure.step:.0%})" for figure in figures]
    return table(header, [[f"{card_line()}; {software_line()}", model, *cells]])


def card_line() -> str:
    """Name, memory, driver."""
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=QUERY_TIMEOUT_S)
        driver = answer.stdout.split("\n")[0].strip()
    except (OSError, subprocess.SubprocessError):
        driver = "of unknown version"
    properties = torch.cuda.get_device_properties(0)
    return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, driver {driver}"


def software_line() -> str:
    names = ("torch", "triton", "flashinfer-python")
    return ", ".join([*(f"{name} {_version(name)}" for name in names), f"CUDA {torch.version.cuda}"])


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    main()
