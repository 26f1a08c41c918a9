"""What quantized weights cost in quality: `python -m tests.bench.perplexity`.

The perplexity of a passage of English prose, dialogue and a little code, teacher-forced: the model reads all of it in
chunks, as it would a prompt, and every position is scored by the token that really follows. The first row is the
checkpoint as its file has it; the next what it would be in plain bfloat16 (`tests.bench.shuffled`), and each of the
others is that, quantized at load.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from math import exp
from pathlib import Path
from typing import get_args

import numpy as np

from engine.attention.metadata import batch_of
from engine.core import Request, SamplingParams, Sequence, Step
from engine.models.checkpoint import Checkpoint, open_checkpoint
from engine.models.place import Place
from engine.models.resolve import resolve
from engine.run.model import RunnableModel
from engine.run.native import load_native
from engine.text.tokenizer import Tokenizer
from kernels.formats import Quantization
from kernels.kinds import Floats
from kvtransfer.layout import KVLayout
from tests.bench.shuffled import Shuffled

PASSAGE = Path(__file__).parent.parent / "models" / "passage.txt"
BLOCK_SIZE = 16
CHUNK = 256  # tokens, whose logits are all kept at once


def perplexity(model: RunnableModel, tokens: list[int], chunk: int = CHUNK) -> float:
    """exp of the mean of -log p(token | all before it), over all tokens but the first."""
    sequence = Sequence.of(Request(id="passage", prompt=tokens, sampling=SamplingParams(max_tokens=1, seed=0)), 0.0)
    sequence.block_table = list(range(-(-len(tokens) // BLOCK_SIZE)))
    layout = layout_of(model, len(sequence.block_table))
    model.attach(layout, memoryview(bytearray(layout.pool_bytes)))
    loss = 0.0
    while count := min(chunk, sequence.num_missing):
        batch = batch_of(Step([sequence], [count]), BLOCK_SIZE)
        logits = np.asarray(model(replace(batch, sampled=np.arange(count))))
        following = np.array(tokens[sequence.num_computed + 1 : sequence.num_computed + count + 1])
        loss -= log_probabilities(logits[: len(following)], following)
        sequence.num_computed += count
    return exp(loss / (len(tokens) - 1))


def log_probabilities(logits: Floats, tokens: np.ndarray) -> float:
    """The sum of the tokens' log-probabilities [rows] under the softmax of logits [rows, vocab]."""
    greatest = logits.max(axis=1)
    total = np.exp(logits - greatest[:, None]).sum(axis=1, dtype=np.float64)
    return float((logits[np.arange(len(tokens)), tokens] - greatest - np.log(total)).sum())


def layout_of(model: RunnableModel, num_blocks: int) -> KVLayout:
    config = model.config
    return KVLayout(
        num_blocks=num_blocks,
        block_size=BLOCK_SIZE,
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        dtype=model.place.dtype,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--text", type=Path, default=PASSAGE)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    tokens = Tokenizer.load(arguments.model).encode(arguments.text.read_text(), add_special_tokens=True)
    stored = open_checkpoint(resolve(arguments.model))
    dense = Checkpoint(stored.config, Shuffled(stored))
    report(stored, "auto", tokens, arguments.threads)
    baseline = report(dense, "none", tokens, arguments.threads)
    for quantization in get_args(Quantization):
        report(dense, quantization, tokens, arguments.threads, baseline)


def report(
    checkpoint: Checkpoint, quantization: str, tokens: list[int], threads: int, baseline: float | None = None
) -> float:
    model = load_native(checkpoint, Place("bfloat16", "cpu"), threads, quantization=quantization)
    found = perplexity(model, tokens)
    ratio = f"{found / (baseline or found) - 1:+8.2%}"
    print(
        f"{quantization:8}{model.quantization:16}{model.kernel.num_bytes / 1e6:7.0f} MB{found:10.4f}{ratio}", flush=True
    )
    return found


if __name__ == "__main__":
    main()
