"""Products with packed weights of each format against the machine: `python -m tests.bench.products`.

Each round measures how fast this machine reads memory and then, format by format, one product of as many weights as a
small model has, which no cache holds. The least of all rounds counts: others may be using the machine.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np

from kernels import cpu
from kernels.formats import BLOCKS, Format, row_items
from kernels.kinds import Items
from kernels.threads import set_threads
from kernels.weight import PackedWeight, Part, multiply, pack_parts

COLUMNS = 4096
ROWS = (1, 8, 32, 512)
READ_BYTES = 256 << 20
FORMATS: list[Format] = ["bfloat16", *BLOCKS]


def packed(format: Format, outputs: int) -> PackedWeight:
    """Of few different rows: what the numbers are does not matter."""
    random = np.random.default_rng(0)
    rows: Items = random.integers(0, 64, (256, row_items(format, COLUMNS)), np.uint8)
    if format == "bfloat16":
        rows = rows.astype(np.uint16) << 8
    return pack_parts([Part(rows, format)] * (outputs // 256), COLUMNS, "bfloat16")


def seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--outputs", type=int, default=32768, help="a multiple of 256")
    parser.add_argument("--format", choices=FORMATS, action="append", help="these only")
    arguments = parser.parse_args()
    set_threads(arguments.threads)
    memory = np.ones(READ_BYTES, np.uint8).view(np.uint64)
    weights = {format: packed(format, arguments.outputs) for format in arguments.format or FORMATS}
    print(f"{cpu.REASON}, {arguments.threads} threads, [{arguments.outputs}, {COLUMNS}]")
    print(f"{'':10}{'MB':>8}  " + "".join(f"{f'{rows} rows':>24}" for rows in ROWS))
    best = {(format, rows): np.inf for format in weights for rows in ROWS}
    read = np.inf
    inputs = {rows: np.ones((rows, COLUMNS), np.float32) for rows in ROWS}
    for _ in range(arguments.rounds):
        read = min(read, seconds(lambda: np.bitwise_or.reduce(memory)))
        for format, rows in best:
            taken = seconds(lambda format=format, rows=rows: multiply(inputs[rows], weights[format]))
            best[format, rows] = min(best[format, rows], taken)
    bandwidth = READ_BYTES / read
    for format, weight in weights.items():
        cells = (cell(weight.num_bytes, best[format, rows], bandwidth) for rows in ROWS)
        print(f"{format:10}{weight.num_bytes / 1e6:8.1f}  " + "".join(cells))
    print(f"memory: {bandwidth / 1e9:.1f} GB/s by one thread")


def cell(num_bytes: int, taken: float, bandwidth: float) -> str:
    speed = num_bytes / taken
    return f"{taken * 1e3:8.2f}ms {speed / 1e9:5.1f}GB/s {speed / bandwidth:4.0%}"


if __name__ == "__main__":
    main()
