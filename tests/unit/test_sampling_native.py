"""The native sampler chooses what the one on torch chooses, and changes nothing that it was only lent."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from engine.core import Request, SamplingParams, Sequence
from engine.sampling import sampler
from engine.sampling.history import history_of
from engine.sampling.randomness import uniforms
from kernels import cpu

if not cpu.NATIVE:
    pytest.skip(cpu.REASON, allow_module_level=True)

from engine.sampling import native
from engine.sampling.borrowed import adjusted

VOCAB_SIZE = 3000
tokens = st.integers(0, VOCAB_SIZE - 1)
wishes = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 1e-6, 0.7, 1.0, 1.5]),
        "min_p": st.sampled_from([0.0, 0.05]),
        "top_k": st.sampled_from([0, 1, 40, 5000]),
        "top_p": st.sampled_from([1.0, 0.9, 0.5]),
        "repetition_penalty": st.sampled_from([1.0, 0.7, 1.3]),
        "presence_penalty": st.sampled_from([0.0, -1.0, 0.5]),
        "frequency_penalty": st.sampled_from([0.0, 1.2]),
        "logit_bias": st.dictionaries(tokens, st.sampled_from([-100.0, -1.0, 2.5]), max_size=3),
        "min_tokens": st.integers(0, 6),
        "stop_token_ids": st.lists(tokens, max_size=3, unique=True).map(tuple),
        "logprobs": st.sampled_from([None, None, 0, 5]),
        "seed": st.integers(0, 2**63),
    }
)
# Few ids, so that a token is in the prompt, in the output, often, and among the stops.
batches = st.lists(st.tuples(wishes, st.lists(st.integers(0, 40), max_size=12)), min_size=1, max_size=5)


def sequence(wish: dict[str, Any], output: list[int]) -> Sequence:
    request = Request(id="test", prompt=[5, 6, 7, 5], sampling=SamplingParams(max_tokens=50, **wish))
    found = Sequence.of(request, arrival=0.0)
    found.tokens += output
    return found


@settings(max_examples=80, deadline=None)
@given(batch=batches, scale=st.sampled_from([1.0, 4.0]), ties=st.booleans(), seed=st.integers(0, 99))
def test_both_samplers_choose_the_same(batch: list[Any], scale: float, ties: bool, seed: int) -> None:
    exact = np.random.default_rng(seed).standard_normal((len(batch), VOCAB_SIZE)) * scale
    logits = (np.round(exact * 2) if ties else exact).astype(np.float32)
    rows = [sequence(*row) for row in batch]
    lent = logits.copy()
    ours, theirs = native.sample(lent, rows), sampler.sample(torch.from_numpy(logits), rows)
    assert np.array_equal(lent, logits)
    assert ours.tokens == theirs.tokens
    for our, their in zip(ours.logprobs, theirs.logprobs, strict=True):
        if our is None or their is None:
            assert our is their
        else:
            assert our.top_ids == their.top_ids
            assert our.logprob == pytest.approx(their.logprob, abs=1e-5)
            assert our.top_logprobs == pytest.approx(their.top_logprobs, abs=1e-5)


def test_logits_are_put_back_after_an_error_too() -> None:
    logits = np.ones((1, 50), np.float32)
    wish = {"seed": 0, "repetition_penalty": 2.0, "logit_bias": {5: 1.0}, "min_tokens": 9, "stop_token_ids": (7,)}
    with adjusted(logits, [sequence(wish, [])]):
        assert logits[0, [5, 6, 7, 8]].tolist() == [1.0, 0.5, -np.inf, 1.0]
    assert (logits == 1).all()
    with pytest.raises(ZeroDivisionError):
        fail_within(logits, sequence(wish, []))
    assert (logits == 1).all()


def fail_within(logits: NDArray[np.float32], row: Sequence) -> None:
    with adjusted(logits, [row]):
        raise ZeroDivisionError


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 400), max_size=600), st.lists(st.integers(1, 60), min_size=1, max_size=8))
def test_a_history_that_grows_is_one_counted_at_once(output: list[int], strides: list[int]) -> None:
    row = sequence({"seed": 0}, [])
    while row.num_output < len(output):
        row.tokens += output[row.num_output :][: strides[row.num_output % len(strides)]]
        history_of(row)
    history = history_of(row)
    counts = dict(zip(history.tokens.tolist(), history.counts.tolist(), strict=True))
    assert counts == {token: output.count(token) for token in {*row.request.prompt, *output}}


def test_a_step_of_a_long_answer_counts_its_new_token_alone() -> None:
    class Counting(list[int]):
        num_read = 0

        def __getitem__(self, place: Any) -> Any:
            found = super().__getitem__(place)
            Counting.num_read += len(found) if isinstance(place, slice) else 1
            return found

    row = sequence({"seed": 0, "repetition_penalty": 1.1}, list(range(40)))
    row.tokens = Counting(row.tokens)
    native.sample(np.zeros((1, 50), np.float32), [row])
    Counting.num_read = 0
    row.tokens.append(3)
    native.sample(np.zeros((1, 50), np.float32), [row])
    assert Counting.num_read == 1


def test_torch_is_not_loaded() -> None:
    program = "import sys, engine.sampling.native; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_a_seed_draws_what_it_always_drew() -> None:
    """With equal weights a token is the uniform number's share of the vocabulary."""
    row = sequence({"seed": 7}, [1, 2, 3])
    token = native.sample(np.zeros((1, VOCAB_SIZE), np.float32), [row]).tokens[0]
    assert token == int(uniforms([7], [3])[0] * VOCAB_SIZE)
