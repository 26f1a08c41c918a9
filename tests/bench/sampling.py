"""What choosing tokens costs a step: `python -m tests.bench.sampling`.

Our sampler and the one on torch, in turns, choose from the same logits for the same rows. The least of all rounds
counts: others may be using the machine. Logits fall with the logarithm of their rank, as a language model's do; in a
row marked flat they are normal numbers that leave thousands of tokens in a nucleus.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from engine.core import Request, SamplingParams, Sequence
from engine.sampling import native, sampler
from kernels import cpu
from kernels.threads import set_threads
from tests.bench.report import machine, table

VOCAB_SIZE = 49152
PROMPT_TOKENS = 500
OUTPUT_TOKENS = 1000
STEEPNESS = 1.5  # a token's logit falls by so much for each e-fold of its rank


@dataclass(frozen=True)
class Case:
    name: str
    wishes: dict[str, Any]
    flat: bool = False


CASES = (
    Case("greedy", {"temperature": 0.0}),
    Case("temperature", {}),
    Case("top-p 0.9", {"top_p": 0.9}),
    Case("top-p 0.9, flat", {"top_p": 0.9}, flat=True),
    Case("top-k 50", {"top_k": 50}),
    Case("top-k 50, top-p 0.9, min-p 0.02", {"top_k": 50, "top_p": 0.9, "min_p": 0.02}),
    Case("penalties", {"repetition_penalty": 1.1, "presence_penalty": 0.2, "frequency_penalty": 0.2}),
    Case("logprobs 5", {"temperature": 0.0, "logprobs": 5}),
)


def logits_for(num_rows: int, flat: bool) -> NDArray[np.float32]:
    random = np.random.default_rng(0)
    noise = random.standard_normal((num_rows, VOCAB_SIZE))
    if flat:
        return noise.astype(np.float32)
    falling = 20 - STEEPNESS * np.log(np.arange(1, VOCAB_SIZE + 1))
    return random.permuted(falling + 0.3 * noise, axis=1).astype(np.float32)


def rows_for(num_rows: int, wishes: dict[str, Any]) -> list[Sequence]:
    random = np.random.default_rng(1)
    rows = []
    for seed in range(num_rows):
        sampling = SamplingParams(max_tokens=10_000, seed=seed, **wishes)
        prompt = random.integers(0, VOCAB_SIZE, PROMPT_TOKENS).tolist()
        row = Sequence.of(Request(id=str(seed), prompt=prompt, sampling=sampling), arrival=0.0)
        row.tokens += random.integers(0, VOCAB_SIZE, OUTPUT_TOKENS).tolist()
        rows.append(row)
    return rows


def seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def measure(case: Case, num_rows: int, rounds: int) -> tuple[float, float]:
    """Milliseconds of ours and of torch's. Every round's rows have one token more, as every step's do."""
    logits, rows = logits_for(num_rows, case.flat), rows_for(num_rows, case.wishes)
    tensor = torch.from_numpy(logits)
    ours, theirs = [], []
    for number in range(rounds):
        ours.append(seconds(lambda: native.sample(logits, rows)))
        theirs.append(seconds(lambda: sampler.sample(tensor, rows)))
        for row in rows:
            row.tokens.append(number)
    return min(ours) * 1e3, min(theirs) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    arguments = parser.parse_args()
    set_threads(arguments.threads)
    torch.set_num_threads(arguments.threads)
    print(f"{machine()}; {cpu.REASON}; torch {torch.__version__}")
    print(f"{arguments.threads} threads, a vocabulary of {VOCAB_SIZE} tokens\n")
    lines = []
    for case in CASES:
        times = [measure(case, num_rows, arguments.rounds) for num_rows in arguments.rows]
        lines.append([case.name, *(f"{ours:.3f} / {torchs:.2f} = 1/{torchs / ours:.0f}" for ours, torchs in times)])
    print(table(["ms, ours / torch", *(f"{num_rows} rows" for num_rows in arguments.rows)], lines))


if __name__ == "__main__":
    main()
