"""Sampled tokens follow the distribution the user asked for, and depend on the request alone."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.core import Request, SamplingParams, Sequence
from engine.sampling.draw import largest
from engine.sampling.randomness import uniforms
from tests.unit.samplers import SAMPLERS, Sampler

DRAWS = 4000
VOCAB_SIZE = 1000
WORD = 2**64 - 1
CHI_SQUARE_LIMIT = 4.5  # standard deviations above the mean, at fixed seeds: chance alone would fail one run in 100,000


def row(output: int = 0, **wishes: Any) -> Sequence:
    """A sequence with some output already; what the output is does not matter here."""
    wishes = {"max_tokens": 100, "seed": 0, **wishes}
    sequence = Sequence.of(Request(id="test", prompt=[1, 2], sampling=SamplingParams(**wishes)), arrival=0.0)
    sequence.tokens += [3] * output
    return sequence


@pytest.fixture(params=SAMPLERS.values(), ids=SAMPLERS, scope="module")
def sample(request: pytest.FixtureRequest) -> Sampler:
    """Each in turn."""
    found: Sampler = request.param
    return found


def logits_of(probabilities: list[float]) -> Tensor:
    return torch.tensor(probabilities).log()


def draws(sample: Sampler, logits: Tensor, **wishes: Any) -> Counter[int]:
    """How often each token came, over many seeds."""
    rows = [row(seed=seed, **wishes) for seed in range(DRAWS)]
    return Counter(sample(logits.expand(DRAWS, -1), rows).tokens)


def assert_follows(counts: Counter[int], expected: Tensor) -> None:
    """Chi-square, as a normal deviate (Wilson and Hilferty), over the tokens that can come; the others never came."""
    possible = [token for token, share in enumerate(expected.tolist()) if share > 0]
    assert set(counts) <= set(possible)
    shares = expected[possible] / expected[possible].sum() * DRAWS
    seen = torch.tensor([counts[token] for token in possible])
    statistic, freedom = float(((seen - shares) ** 2 / shares).sum()), len(possible) - 1
    if freedom:
        deviate = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
        assert deviate < CHI_SQUARE_LIMIT


PROBABILITIES = [0.05, 0.3, 0.02, 0.2, 0.1, 0.15, 0.08, 0.1]


def test_greedy_takes_the_likeliest_and_the_first_of_equals(sample: Sampler) -> None:
    logits = torch.tensor([[0.0, 2.0, 2.0], [3.0, 1.0, 3.0]])
    assert sample(logits, [row(temperature=0.0), row(temperature=0.0)]).tokens == [1, 0]


def test_plain_sampling_follows_the_softmax(sample: Sampler) -> None:
    assert_follows(draws(sample, logits_of(PROBABILITIES)), torch.tensor(PROBABILITIES))


@pytest.mark.parametrize("temperature", [0.5, 1.7])
def test_temperature_sharpens_and_flattens(sample: Sampler, temperature: float) -> None:
    expected = torch.tensor(PROBABILITIES) ** (1 / temperature)
    assert_follows(draws(sample, logits_of(PROBABILITIES), temperature=temperature), expected)


def test_top_k_keeps_k_tokens_and_the_lower_ids_of_equals(sample: Sampler) -> None:
    expected = torch.tensor([0, 0.3, 0, 0.2, 0.1, 0.15, 0, 0])  # tokens 4 and 7 tie for the last place
    assert_follows(draws(sample, logits_of(PROBABILITIES), top_k=4), expected)


def test_top_p_keeps_the_smallest_set_that_reaches_p(sample: Sampler) -> None:
    expected = torch.tensor([0, 0.3, 0, 0.2, 0, 0.15, 0, 0])  # 0.3, 0.5, 0.65: the third crosses 0.6
    assert_follows(draws(sample, logits_of(PROBABILITIES), top_p=0.6), expected)


def test_top_p_counts_among_what_top_k_left(sample: Sampler) -> None:
    expected = torch.tensor([0, 0.3, 0, 0.2, 0, 0, 0, 0])  # of 0.3, 0.2, 0.15 two have 77%
    assert_follows(draws(sample, logits_of(PROBABILITIES), top_k=3, top_p=0.7), expected)


def test_min_p_drops_what_is_far_below_the_likeliest(sample: Sampler) -> None:
    expected = torch.tensor([0, 0.3, 0, 0.2, 0.1, 0.15, 0, 0.1])  # a third of 0.3 stays, 0.08 goes
    assert_follows(draws(sample, logits_of(PROBABILITIES), min_p=0.33), expected)


def test_top_p_is_right_when_the_nucleus_is_most_of_a_large_vocabulary(sample: Sampler) -> None:
    flat = torch.linspace(1.0, 0.5, VOCAB_SIZE)
    share = flat / flat.sum()
    kept = int((share.cumsum(0) < 0.8).sum()) + 1
    counts = draws(sample, share.log(), top_p=0.8)
    assert kept > 256
    assert max(counts) < kept
    assert max(counts) > kept - 20


@pytest.mark.parametrize("wishes", [{"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}, {"temperature": 1e-7}])
def test_the_narrowest_filters_are_greedy(sample: Sampler, wishes: dict[str, float]) -> None:
    assert set(draws(sample, logits_of(PROBABILITIES), **wishes)) == {1}


def test_filters_wider_than_the_vocabulary_change_nothing(sample: Sampler) -> None:
    plain = draws(sample, logits_of(PROBABILITIES))
    assert draws(sample, logits_of(PROBABILITIES), top_k=100) == draws(sample, logits_of(PROBABILITIES), top_k=8)
    assert_follows(draws(sample, logits_of(PROBABILITIES), top_k=100, top_p=1.0), torch.tensor(PROBABILITIES))
    assert_follows(plain, torch.tensor(PROBABILITIES))


@pytest.mark.parametrize("wishes", [{}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1}])
def test_a_token_of_no_probability_never_comes(sample: Sampler, wishes: dict[str, float]) -> None:
    logits = torch.tensor([-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf])
    assert set(draws(sample, logits, **wishes)) == {1, 3}


kinds = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.7, 1.0, 1.5]),
        "top_k": st.sampled_from([0, 1, 5, 300, 2000]),
        "top_p": st.sampled_from([1.0, 0.95, 0.3]),
        "min_p": st.sampled_from([0.0, 0.05]),
        "repetition_penalty": st.sampled_from([1.0, 1.3]),
        "logit_bias": st.sampled_from([{}, {3: 5.0}]),
        "logprobs": st.sampled_from([None, 0, 4]),
        "seed": st.integers(-5, 2**64),
        "output": st.integers(0, 30),
    }
)


@settings(max_examples=60, deadline=None)
@given(wishes=st.lists(kinds, min_size=1, max_size=6), order=st.randoms(use_true_random=False))
def test_a_row_never_depends_on_the_rows_beside_it(sample: Sampler, wishes: list[dict[str, Any]], order: Any) -> None:
    """Coarse logits have many ties, as bfloat16 ones do: those are where batches would leak into each other."""
    generator = torch.Generator().manual_seed(1)
    logits = (torch.randn(len(wishes), VOCAB_SIZE, generator=generator) * 8).round() / 4
    rows = [row(**wish) for wish in wishes]
    alone = [sample(logits[i : i + 1], [rows[i]]) for i in range(len(rows))]
    shuffled = list(range(len(rows)))
    order.shuffle(shuffled)
    together = sample(logits[shuffled], [rows[i] for i in shuffled])
    assert together.tokens == [alone[i].tokens[0] for i in shuffled]
    assert together.logprobs == [alone[i].logprobs[0] for i in shuffled]


def test_a_row_depends_on_its_seed_and_its_place_in_the_output(sample: Sampler) -> None:
    logits = torch.zeros(1, VOCAB_SIZE)
    tokens = {
        (seed, output): sample(logits, [row(output, seed=seed)]).tokens[0] for seed in range(8) for output in range(8)
    }
    assert len(set(tokens.values())) > 50
    assert tokens[3, 4] == sample(logits, [row(4, seed=3)]).tokens[0]


def test_seeds_are_taken_modulo_two_to_the_64() -> None:
    assert uniforms([-1, 5], [0, 1]).tolist() == uniforms([2**64 - 1, 2**64 + 5], [0, 1]).tolist()


@pytest.mark.parametrize("along", ["seeds", "counters"])
def test_uniforms_are_even_and_unrelated(along: str) -> None:
    numbers = uniforms(range(DRAWS), [0] * DRAWS) if along == "seeds" else uniforms([7] * DRAWS, range(DRAWS))
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert_follows(Counter((numbers * 20).astype(int).tolist()), torch.full((20,), 1 / 20))
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 4 / math.sqrt(DRAWS)


def splitmix64(state: int) -> int:
    """Vigna's splitmix64.c, in plain integers."""
    mixed = state + 0x9E3779B97F4A7C15 & WORD
    mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 & WORD
    mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB & WORD
    return mixed ^ mixed >> 31


@pytest.mark.parametrize(("seed", "counter"), [(0, 0), (7, 0), (7, 1), (2**63 + 1, 8191)])
def test_uniforms_never_change(seed: int, counter: int) -> None:
    """A release that drew otherwise would break the answers of seeded requests that move between engines."""
    assert splitmix64(0) == 0xE220A8397B1DCDAF
    bits = splitmix64(splitmix64(seed) + counter * 0x9E3779B97F4A7C15 & WORD)
    assert uniforms([seed], [counter]).tolist() == [(bits >> 11) / 2**53]


def test_logprobs_are_of_the_raw_logits(sample: Sampler) -> None:
    logits = torch.randn(2, VOCAB_SIZE, generator=torch.Generator().manual_seed(2))
    rows = [row(temperature=0.3, logit_bias={9: 100.0}, logprobs=3), row(temperature=0.0)]
    output = sample(logits, rows)
    found, expected = output.logprobs[0], logits[0].log_softmax(0)
    assert output.tokens[0] == 9
    assert output.logprobs[1] is None
    assert found is not None
    assert found.logprob == pytest.approx(float(expected[9]), abs=1e-6)
    assert found.top_ids == expected.topk(3).indices.tolist()
    assert found.top_logprobs == pytest.approx(expected.topk(3).values.tolist(), abs=1e-6)


def test_logprobs_of_zero_rivals_give_the_chosen_alone(sample: Sampler) -> None:
    found = sample(torch.zeros(1, 4), [row(temperature=0.0, logprobs=0)]).logprobs[0]
    assert found is not None
    assert found.logprob == pytest.approx(-math.log(4), abs=1e-6)
    assert (found.top_ids, found.top_logprobs) == ([], [])


def test_logits_are_left_as_they_are(sample: Sampler) -> None:
    logits = torch.randn(2, VOCAB_SIZE)
    before = logits.clone()
    sample(logits, [row(repetition_penalty=2.0, logit_bias={1: 3.0}, min_p=0.1), row(top_p=0.5, top_k=4)])
    assert torch.equal(logits, before)


def test_bfloat16_logits_are_sampled_in_float32(sample: Sampler) -> None:
    logits = logits_of(PROBABILITIES).bfloat16()
    assert_follows(draws(sample, logits), logits.float().softmax(0))


@settings(max_examples=100, deadline=None)
@given(scores=st.lists(st.integers(-3, 3), min_size=1, max_size=40), count=st.integers(1, 40))
def test_largest_puts_the_lower_id_first(scores: list[int], count: int) -> None:
    count = min(count, len(scores))
    expected = sorted(range(len(scores)), key=lambda token: (-scores[token], token))[:count]
    assert largest(torch.tensor([scores], dtype=torch.float32), count).tolist() == [expected]


@pytest.mark.parametrize("wishes", [{"top_p": 0.9}, {"top_k": 300}, {"top_p": 0.9999}])
def test_rounding_errors_do_not_change_what_a_seed_draws(sample: Sampler, wishes: dict[str, float]) -> None:
    """A batch's shape changes logits by about 1e-6, and so the order of tokens that are about as likely."""
    rivals = torch.randn(VOCAB_SIZE // 2, generator=torch.Generator().manual_seed(1)).mul_(2)
    logits = torch.cat((rivals, rivals))
    rows = [row(seed=seed, **wishes) for seed in range(500)]
    noise = torch.randn(500, VOCAB_SIZE, generator=torch.Generator().manual_seed(2)).mul_(1e-6)
    drawn = sample(logits.expand(500, -1), rows).tokens
    again = sample(logits + noise, rows).tokens
    assert sum(map(int.__ne__, drawn, again)) <= 2  # where the last that is kept has an equal, either may be
