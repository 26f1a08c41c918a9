"""Bias, minimum length and penalties do what their slow, obvious version does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.core import Request, SamplingParams, Sequence
from engine.sampling.adjustments import adjust
from tests.unit.samplers import SAMPLERS, Sampler

VOCAB_SIZE = 12
tokens = st.integers(0, VOCAB_SIZE - 1)
wishes = st.fixed_dictionaries(
    {
        "repetition_penalty": st.sampled_from([1.0, 0.7, 1.5]),
        "presence_penalty": st.sampled_from([0.0, -1.0, 0.5]),
        "frequency_penalty": st.sampled_from([0.0, -0.3, 1.2]),
        "logit_bias": st.dictionaries(tokens, st.sampled_from([-100.0, -1.0, 2.5, 100.0]), max_size=4),
        "min_tokens": st.integers(0, 6),
        "stop_token_ids": st.lists(tokens, max_size=3, unique=True).map(tuple),
    }
)
rows = st.tuples(st.lists(tokens, min_size=1, max_size=8), st.lists(tokens, max_size=8), wishes)


@pytest.fixture(params=SAMPLERS.values(), ids=SAMPLERS, scope="module")
def sample(request: pytest.FixtureRequest) -> Sampler:
    """Each in turn."""
    found: Sampler = request.param
    return found


def sequence(prompt: list[int], output: list[int], wish: dict[str, Any]) -> Sequence:
    sampling = SamplingParams(max_tokens=50, seed=0, **wish)
    found = Sequence.of(Request(id="test", prompt=prompt, sampling=sampling), arrival=0.0)
    found.tokens += output
    return found


def obvious(logit: float, token: int, prompt: list[int], output: list[int], wish: dict[str, Any]) -> float:
    logit += wish["logit_bias"].get(token, 0.0)
    if len(output) < wish["min_tokens"] and token in wish["stop_token_ids"]:
        return -torch.inf
    if token in prompt or token in output:
        logit = logit / wish["repetition_penalty"] if logit > 0 else logit * wish["repetition_penalty"]
    if token in output:
        logit -= wish["presence_penalty"] + wish["frequency_penalty"] * output.count(token)
    return logit


@settings(max_examples=200, deadline=None)
@given(batch=st.lists(rows, min_size=1, max_size=4), seed=st.integers(0, 100))
def test_a_batch_is_adjusted_as_one_token_at_a_time(batch: list[Any], seed: int) -> None:
    logits = torch.randn(len(batch), VOCAB_SIZE, generator=torch.Generator().manual_seed(seed)) * 3
    expected = [
        [obvious(float(logits[number, token]), token, *row) for token in range(VOCAB_SIZE)]
        for number, row in enumerate(batch)
    ]
    adjust(logits, [sequence(*row) for row in batch])
    torch.testing.assert_close(logits, torch.tensor(expected), rtol=1e-5, atol=1e-5)


def test_stops_are_forbidden_until_min_tokens_are_out(sample: Sampler) -> None:
    logits = torch.tensor([[0.0, 1.0, 5.0]])
    wish = {"min_tokens": 2, "stop_token_ids": (2,), "temperature": 0.0}
    outputs: list[list[int]] = [[], [1], [1, 1]]
    assert [sample(logits, [sequence([0], output, wish)]).tokens[0] for output in outputs] == [1, 1, 2]


@pytest.mark.parametrize("bias", [100.0, -100.0])
def test_a_strong_bias_forces_or_forbids(sample: Sampler, bias: float) -> None:
    logits = torch.randn(1, VOCAB_SIZE, generator=torch.Generator().manual_seed(3))
    plain = int(logits.argmax())
    other = (plain + 1) % VOCAB_SIZE
    wish = {"logit_bias": {other if bias > 0 else plain: bias}, "temperature": 0.0}
    chosen = sample(logits, [sequence([0], [], wish)]).tokens[0]
    assert chosen == other if bias > 0 else chosen != plain
