"""One forward of SmolLM2 against the machine: `python tests/bench/forward.py`.

Each round measures, one after the other, how fast this machine reads memory, how fast torch (oneDNN) multiplies
bfloat16 matrices, and how long our forward and torch's take. The floor of a step is the larger of its bytes by the
first and its flops by the second. The least of all rounds counts: others may be using the machine.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from engine.attention.metadata import Batch, batch_of
from engine.core import Request, SamplingParams, Sequence, Step
from engine.models.config import ModelConfig
from engine.models.load import load_model
from engine.models.resolve import resolve
from engine.run.model import RunnableModel, runnable
from engine.run.torch_model import TorchModel
from kernels import cpu
from kvtransfer.layout import KVLayout

BLOCK_SIZE = 16
NUM_BLOCKS = 640
CONTEXT = 200
READ_BYTES = 256 << 20
MATRIX = 2048


@dataclass(frozen=True)
class Case:
    name: str
    num_rows: int
    num_new: int
    context: int

    def flops(self, config: ModelConfig) -> float:
        """Products of the layers for every token, of the head for a row's last, and attention."""
        tokens = self.num_rows * self.num_new
        seen = tokens * (self.context + (self.num_new + 1) / 2)
        attention = 4 * config.num_layers * config.num_heads * config.head_dim * seen
        return 2.0 * (layer_weights(config) * tokens + head_weights(config) * self.num_rows) + attention

    def bytes(self, config: ModelConfig) -> float:
        """Every weight once, and each row's keys and values, in bfloat16."""
        cached = self.num_rows * self.context * config.num_layers * 2 * config.num_kv_heads * config.head_dim
        return 2.0 * (layer_weights(config) + head_weights(config) + cached)


CASES = (
    Case("1 stream", 1, 1, CONTEXT),
    Case("8 streams", 8, 1, CONTEXT),
    Case("32 streams", 32, 1, CONTEXT),
    Case("512-token prompt", 1, 512, 0),
    Case("2,048-token prompt", 1, 2048, 0),
)


def layer_weights(config: ModelConfig) -> int:
    heads = 2 * config.num_heads + 2 * config.num_kv_heads
    return config.num_layers * config.hidden_size * (heads * config.head_dim + 3 * config.intermediate_size)


def head_weights(config: ModelConfig) -> int:
    return config.vocab_size * config.hidden_size


@dataclass
class Times:
    seconds: list[float] = field(default_factory=list)

    def measure(self, call: Callable[[], object]) -> None:
        started = time.perf_counter()
        call()
        self.seconds.append(time.perf_counter() - started)

    @property
    def least(self) -> float:
        return min(self.seconds)

    @property
    def middle(self) -> float:
        return float(np.median(self.seconds))


def batch_for(case: Case) -> Batch:
    rows, blocks = [], iter(range(NUM_BLOCKS))
    for row in range(case.num_rows):
        tokens = [(row * 131 + i * 7919) % 49152 for i in range(case.context + case.num_new)]
        request = Request(id=str(row), prompt=tokens, sampling=SamplingParams(max_tokens=1, seed=0))
        sequence = Sequence.of(request, arrival=0.0)
        sequence.num_computed = case.context
        sequence.block_table = [next(blocks) for _ in range(-(-len(tokens) // BLOCK_SIZE))]
        rows.append(sequence)
    return batch_of(Step(rows, [case.num_new] * case.num_rows), BLOCK_SIZE, torch.device("cpu"))


def with_pool(model: RunnableModel) -> RunnableModel:
    config = model.config
    layout = KVLayout(
        num_blocks=NUM_BLOCKS,
        block_size=BLOCK_SIZE,
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        dtype="bfloat16",
    )
    model.attach(layout, memoryview(bytearray(layout.pool_bytes)))
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-torch", action="store_true", help="leave torch's forward out")
    arguments = parser.parse_args()
    path = resolve("smollm2")
    ours = with_pool(runnable(load_model(path, "bfloat16", "cpu"), arguments.threads, ()))
    theirs = None if arguments.no_torch else with_pool(TorchModel(load_model(path, "bfloat16", "cpu")))
    print(f"{cpu.REASON}, {arguments.threads} threads, torch {torch.__version__}")
    print(f"{'':20}{'ours':>10}{'median':>10}{'torch':>10}{'floor':>10}  of the floor")
    torch.set_num_threads(arguments.threads)
    for case in CASES:
        report(case, ours, theirs, arguments.rounds)


def report(case: Case, ours: RunnableModel, theirs: RunnableModel | None, rounds: int) -> None:
    batch = batch_for(case)
    memory = torch.ones(READ_BYTES // 4)
    left, right = (torch.ones(MATRIX, MATRIX, dtype=torch.bfloat16) for _ in range(2))
    read, product, our, their = Times(), Times(), Times(), Times()
    for _ in range(rounds):
        for _ in range(3):  # as often as ours: the least of more tries is less
            read.measure(memory.sum)
            product.measure(lambda: left @ right)
            our.measure(lambda: ours(batch))
        if theirs is not None:
            their.measure(lambda: theirs(batch))
    bandwidth, speed = READ_BYTES / read.least, 2 * MATRIX**3 / product.least
    floor = max(case.bytes(ours.config) / bandwidth, case.flops(ours.config) / speed)
    torchs = f"{their.least * 1e3:8.1f}ms" if theirs is not None else f"{'-':>10}"
    print(
        f"{case.name:20}{our.least * 1e3:8.1f}ms{our.middle * 1e3:8.1f}ms{torchs}{floor * 1e3:8.1f}ms"
        f"  {floor / our.least:5.0%}   ({bandwidth / 1e9:.1f} GB/s, {speed / 1e9:.0f} GFLOP/s)",
        flush=True,
    )


if __name__ == "__main__":
    main()
