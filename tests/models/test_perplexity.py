"""Quality: how well the bundled model predicts a passage with its weights kept in every way there is."""

from __future__ import annotations

import numpy as np
import pytest

from engine.models.checkpoint import Checkpoint, open_checkpoint
from engine.models.place import Place
from engine.models.resolve import resolve
from engine.text.tokenizer import Tokenizer
from kernels import cpu

if not cpu.NATIVE:
    pytest.skip(cpu.REASON, allow_module_level=True)

from engine.run.native import load_native
from tests.bench.perplexity import PASSAGE, log_probabilities, perplexity
from tests.bench.shuffled import Shuffled

NUM_TOKENS = 700  # of the passage: enough to tell the formats apart


@pytest.fixture(scope="module")
def tokens() -> list[int]:
    return Tokenizer.load("smollm2").encode(PASSAGE.read_text(), add_special_tokens=True)[:NUM_TOKENS]


@pytest.fixture(scope="module")
def dense() -> Checkpoint:
    stored = open_checkpoint(resolve("smollm2"))
    return Checkpoint(stored.config, Shuffled(stored))


@pytest.fixture(scope="module")
def baseline(dense: Checkpoint, tokens: list[int]) -> float:
    return of(dense, "none", tokens)


def of(checkpoint: Checkpoint, quantization: str, tokens: list[int]) -> float:
    return perplexity(load_native(checkpoint, Place("bfloat16", "cpu"), 2, quantization=quantization), tokens)


def test_the_passage_is_english_to_the_model(baseline: float) -> None:
    assert 5 < baseline < 40


def test_another_order_of_the_channels_is_the_same_model(baseline: float, tokens: list[int]) -> None:
    """Or the ones below would measure something else. Sums in another order, rounded to bfloat16."""
    assert of(open_checkpoint(resolve("smollm2")), "auto", tokens) == pytest.approx(baseline, rel=0.01)


@pytest.mark.parametrize(("quantization", "most"), [("q8_0", 0.005), ("q4_1", 0.35), ("q4_0", 0.35)])
def test_quantizing_costs_little(
    quantization: str, most: float, dense: Checkpoint, baseline: float, tokens: list[int]
) -> None:
    assert abs(of(dense, quantization, tokens) / baseline - 1) < most


def test_log_probabilities_are_those_of_the_softmax() -> None:
    logits = np.log(np.array([[0.25, 0.5, 0.25], [0.1, 0.1, 0.8]], np.float32)) + 7
    assert log_probabilities(logits, np.array([1, 2])) == pytest.approx(np.log(0.5 * 0.8), rel=1e-5)
