"""One forward of SmolLM2 against the machine: `python -m tests.bench.forward`.

Each round measures, one after the other, how fast this machine reads memory, how fast torch (oneDNN) multiplies
bfloat16 matrices, and how long our forward and torch's take. The floor of a step is the larger of its bytes by the
first and its flops by the second. The least of all rounds counts: others may be using the machine.
"""

from __future__ import annotations

import argparse

import torch

from engine.attention.metadata import Batch, batch_of
from engine.core import Request, SamplingParams, Sequence, Step
from engine.models.checkpoint import open_checkpoint
from engine.models.place import choose_place
from engine.models.resolve import resolve
from engine.run.model import RunnableModel, load_runnable
from engine.run.torch_model import TorchModel
from kernels import cpu
from kvtransfer.layout import KVLayout
from tests.bench.floor import Case, Probe, Times

BLOCK_SIZE = 16
NUM_BLOCKS = 640
CONTEXT = 200


CASES = (
    Case("1 stream", 1, 1, CONTEXT),
    Case("8 streams", 8, 1, CONTEXT),
    Case("32 streams", 32, 1, CONTEXT),
    Case("512-token prompt", 1, 512, 0),
    Case("2,048-token prompt", 1, 2048, 0),
)


def batch_for(case: Case) -> Batch:
    rows, blocks = [], iter(range(NUM_BLOCKS))
    for row in range(case.num_rows):
        tokens = [(row * 131 + i * 7919) % 49152 for i in range(case.context + case.num_new)]
        request = Request(id=str(row), prompt=tokens, sampling=SamplingParams(max_tokens=1, seed=0))
        sequence = Sequence.of(request, arrival=0.0)
        sequence.num_computed = case.context
        sequence.block_table = [next(blocks) for _ in range(-(-len(tokens) // BLOCK_SIZE))]
        rows.append(sequence)
    return batch_of(Step(rows, [case.num_new] * case.num_rows), BLOCK_SIZE)


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
    ours = with_pool(load_runnable(path, "bfloat16", "cpu", arguments.threads))
    place = choose_place("bfloat16", "cpu")
    theirs = None if arguments.no_torch else with_pool(TorchModel(open_checkpoint(path), place))
    print(f"{cpu.REASON}, {arguments.threads} threads, torch {torch.__version__}")
    print(f"{'':20}{'ours':>10}{'median':>10}{'torch':>10}{'floor':>10}  of the floor")
    torch.set_num_threads(arguments.threads)
    for case in CASES:
        report(case, ours, theirs, arguments.rounds)


def report(case: Case, ours: RunnableModel, theirs: RunnableModel | None, rounds: int) -> None:
    batch = batch_for(case)
    probe, our, their = Probe(), Times(), Times()
    for _ in range(rounds):
        for _ in range(3):  # as often as ours: the least of more tries is less
            probe.measure()
            our.measure(lambda: ours(batch))
        if theirs is not None:
            their.measure(lambda: theirs(batch))
    machine = probe.machine
    floor = machine.floor_s(case, ours.config)
    torchs = f"{their.least * 1e3:8.1f}ms" if theirs is not None else f"{'-':>10}"
    print(
        f"{case.name:20}{our.least * 1e3:8.1f}ms{our.middle * 1e3:8.1f}ms{torchs}{floor * 1e3:8.1f}ms"
        f"  {floor / our.least:5.0%}   ({machine.read / 1e9:.1f} GB/s, {machine.products / 1e9:.0f} GFLOP/s)",
        flush=True,
    )


if __name__ == "__main__":
    main()
