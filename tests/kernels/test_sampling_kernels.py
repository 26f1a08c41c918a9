"""Tokens are chosen as the reference chooses them, on every instruction set, and as often as they should be."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from numpy.typing import NDArray

from kernels import cpu, reference_sampling
from kernels.choice import Choice
from kernels.kinds import Floats
from tests import lesser_isa

if not cpu.NATIVE:
    pytest.skip(cpu.REASON, allow_module_level=True)

from kernels import sampling, threads

ROUNDING = 1e-6  # of a share: float32 exponentials differ by so much in the last places
DRAWS = 20_000
CHI_SQUARE_LIMIT = 4.5  # standard deviations above the mean, at fixed numbers: chance alone would fail one in 100,000
examples = settings(max_examples=lesser_isa.examples(150), deadline=None)


@pytest.fixture(autouse=True, scope="module")
def two_threads() -> None:
    threads.set_threads(2)


def choice_of(
    num_rows: int = 1,
    temperature: float = 1.0,
    min_p: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    uniform: NDArray[np.float64] | float = 0.5,
) -> Choice:
    """The same for all rows, but for the numbers they draw with."""
    return Choice(
        temperature=np.full(num_rows, temperature, np.float32),
        min_p=np.full(num_rows, min_p, np.float32),
        top_k=np.full(num_rows, top_k, np.int64),
        top_p=np.full(num_rows, top_p, np.float64),
        uniform=np.broadcast_to(np.asarray(uniform, np.float64), num_rows).copy(),
    )


sizes = st.one_of(st.integers(1, 70), st.sampled_from([511, 512, 513, 1000, 1025, 3000, 20_000]))
scenes = st.fixed_dictionaries(
    {
        "size": sizes,
        "shape": st.sampled_from(["normal", "ties", "all equal", "half impossible", "one possible", "steep"]),
        "scale": st.sampled_from([1e-6, 0.01, 1.0, 8.0, 1e4, 1e30]),
        "seed": st.integers(0, 999),
    }
)
ways = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.02, 0.7, 1.0, 1.3, 30.0]),
        "min_p": st.sampled_from([0.0, 0.0, 0.02, 0.5, 1.0]),
        "top_k": st.sampled_from([0, 0, 1, 2, 5, 50, 700, 3000, 10**9]),
        "top_p": st.sampled_from([1.0, 1.0, 0.999999, 0.9, 0.5, 0.1, 1e-9]),
        "uniform": st.floats(0, 1, exclude_max=True),
    }
)


def logits_of(scene: dict[str, object]) -> Floats:
    random = np.random.default_rng(int(str(scene["seed"])))
    size, shape = int(str(scene["size"])), scene["shape"]
    logits = random.standard_normal(size)
    if shape == "ties":
        logits = np.round(logits * 2)
    if shape == "all equal":
        logits[:] = -0.5
    if shape == "half impossible":
        logits = np.where(random.random(size) < 0.5, -np.inf, np.round(logits * 4))
    if shape == "one possible":
        logits[:] = -np.inf
    if shape == "steep":
        logits = random.permutation(-np.log1p(np.arange(size)) * 1.5)
    logits[random.integers(size)] = 1.0  # one at least is possible
    return (logits * float(str(scene["scale"]))).astype(np.float32)


def share_before(weights: NDArray[np.float64], token: int) -> float:
    return float(weights[:token].sum() / weights.sum())


@examples
@given(scenes, ways)
def test_the_token_is_the_references(scene: dict[str, object], way: dict[str, float]) -> None:
    logits = logits_of(scene)[None]
    choice = choice_of(1, **way)  # type: ignore[arg-type]
    found, expected = int(sampling.choose(logits, choice)[0]), int(reference_sampling.choose(logits, choice)[0])
    if found != expected and way["min_p"] > 0:  # a weight that rounding alone puts below the least is cut or not
        choice = choice_of(1, **{**way, "min_p": way["min_p"] * (1 - ROUNDING)})
        expected = int(reference_sampling.choose(logits, choice)[0])
    if found != expected:  # the number must have been drawn at a boundary, or a boundary been cut elsewhere
        weights = reference_sampling.kept_weights(logits[0], choice, 0)
        lower, upper = sorted((found, expected))
        skipped = share_before(weights, upper) - share_before(weights, lower + 1)
        edge = share_before(weights, lower + 1)
        assert skipped < ROUNDING
        assert abs(edge - way["uniform"]) < ROUNDING


@examples
@given(scenes, st.integers(1, 5))
def test_the_likeliest_is_what_temperature_zero_chooses(scene: dict[str, object], num_rows: int) -> None:
    logits = np.stack([np.roll(logits_of(scene), shift) for shift in range(num_rows)])
    assert sampling.likeliest(logits).tolist() == logits.argmax(-1).tolist()
    assert sampling.likeliest(logits).tolist() == sampling.choose(logits, choice_of(num_rows, temperature=0.0)).tolist()


@examples
@given(st.lists(ways, min_size=2, max_size=6), st.integers(0, 99))
def test_a_row_never_depends_on_the_rows_beside_it(rows: list[dict[str, float]], seed: int) -> None:
    random = np.random.default_rng(seed)
    apart = np.round(random.standard_normal((len(rows), 40_100)).astype(np.float32) * 8) / 4
    logits = apart[:, :40_000]  # rows lie apart in memory
    choices = [choice_of(1, **row) for row in rows]  # type: ignore[arg-type]
    batch = Choice(
        np.concatenate([choice.temperature for choice in choices]),
        np.concatenate([choice.min_p for choice in choices]),
        np.concatenate([choice.top_k for choice in choices]),
        np.concatenate([choice.top_p for choice in choices]),
        np.concatenate([choice.uniform for choice in choices]),
    )
    alone = [int(sampling.choose(logits[row : row + 1], choice)[0]) for row, choice in enumerate(choices)]
    assert sampling.choose(logits, batch).tolist() == alone


@pytest.mark.parametrize("uniform", [0.0, 0.5, np.nextafter(1, 0)])
@pytest.mark.parametrize("way", [{}, {"top_k": 3}, {"top_p": 0.9999}, {"min_p": 0.5}])
def test_a_token_of_no_probability_never_comes(way: dict[str, float], uniform: float) -> None:
    logits = np.full((1, 2000), -np.inf, np.float32)
    logits[0, [300, 1500]] = 1.0
    choice = choice_of(1, uniform=uniform, **way)  # type: ignore[arg-type]
    assert sampling.choose(logits, choice)[0] == (300 if uniform < 0.5 else 1500)


@pytest.mark.parametrize("way", [{"top_k": 1}, {"top_p": 1e-12}, {"min_p": 1.0}, {"temperature": 0.0}])
def test_the_narrowest_filters_take_the_likeliest(way: dict[str, float]) -> None:
    logits = np.random.default_rng(0).standard_normal((8, 49_152)).astype(np.float32)
    choice = choice_of(8, uniform=np.linspace(0, 0.99, 8), **way)  # type: ignore[arg-type]
    assert np.array_equal(sampling.choose(logits, choice), logits.argmax(-1))


@pytest.mark.parametrize("way", [{}, {"top_k": 2}, {"top_p": 0.5}])
def test_a_row_that_is_no_distribution_still_gives_a_token(way: dict[str, float]) -> None:
    nothing, infinite = np.full(700, -np.inf, np.float32), np.zeros(700, np.float32)
    infinite[[30, 600]] = np.inf
    choice = choice_of(2, **way)  # type: ignore[arg-type]
    assert sampling.choose(np.stack((nothing, infinite)), choice).tolist() == [0, 30]


@pytest.mark.parametrize(
    "way",
    [
        {},
        {"temperature": 1.4},
        {"temperature": 0.6},
        {"min_p": 0.1},
        {"top_k": 20},
        {"top_p": 0.8},
        {"temperature": 1.2, "min_p": 0.01, "top_k": 60, "top_p": 0.9},
    ],
)
def test_tokens_come_as_often_as_they_should(way: dict[str, float]) -> None:
    """Chi-square, as a normal deviate (Wilson and Hilferty), against the exact truncated softmax."""
    random = np.random.default_rng(7)
    logits = random.permutation(-1.1 * np.log1p(np.arange(3000))).astype(np.float32)
    choice = choice_of(DRAWS, uniform=random.random(DRAWS), **way)  # type: ignore[arg-type]
    counts = np.bincount(sampling.choose(np.broadcast_to(logits, (DRAWS, 3000)), choice), minlength=3000)
    shares = exact_shares(logits.astype(np.float64), **way)
    assert not counts[shares == 0].any()
    expected = shares * DRAWS
    often = expected >= 5  # the others are counted as one
    seen = np.append(counts[often], counts[~often].sum())
    wanted = np.append(expected[often], expected[~often].sum())
    seen, wanted = seen[wanted > 0], wanted[wanted > 0]
    statistic, freedom = float(((seen - wanted) ** 2 / wanted).sum()), len(wanted) - 1
    deviate = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    assert deviate < CHI_SQUARE_LIMIT


def exact_shares(
    logits: NDArray[np.float64], temperature: float = 1.0, min_p: float = 0.0, top_k: int = 0, top_p: float = 1.0
) -> NDArray[np.float64]:
    """Token by token, in float64."""
    shares = np.exp(logits / temperature)
    shares[shares < min_p * shares.max()] = 0
    ranked = sorted(range(len(shares)), key=lambda token: (-logits[token], token))
    for token in ranked[top_k or len(ranked) :]:
        shares[token] = 0
    nucleus, total = 0.0, shares.sum()
    for token in ranked:
        if nucleus >= top_p * total:
            shares[token] = 0
        nucleus += shares[token]
    result: NDArray[np.float64] = shares / shares.sum()
    return result


@examples
@given(scenes, st.integers(0, 20))
def test_logprobs(scene: dict[str, object], count: int) -> None:
    logits = logits_of(scene)
    other = logits_of({**scene, "seed": 1234})
    table, count = np.stack((other, logits, other)), min(count, len(logits))
    rows, tokens = np.array([1, 2]), np.array([len(logits) - 1, 0])
    found = sampling.logprobs(table, rows, tokens, count)
    chosen, ids, top = reference_sampling.logprobs(table, rows, tokens, count)
    assert np.array_equal(found.top_ids, ids)
    assert_allclose(found.chosen, chosen, rtol=1e-6, atol=1e-6)
    assert_allclose(found.top, top, rtol=1e-6, atol=1e-6)


def test_penalties_say_what_was_there_before() -> None:
    logits = np.array([2.0, -2.0, 1.0, 4.0], np.float32)
    before = sampling.penalize(logits, np.array([1, 0, 3]), np.array([0, 2, 1]), 2.0, 0.5, 0.25)
    assert before.tolist() == [-2.0, 2.0, 4.0]
    assert logits.tolist() == [2 / 2 - 0.5 - 2 * 0.25, -2 * 2, 1, 4 / 2 - 0.5 - 0.25]


def test_what_does_not_fit_is_refused() -> None:
    logits = np.zeros((2, 10), np.float32)
    with pytest.raises(ValueError, match="number of rows"):
        sampling.choose(logits, choice_of(3))
    with pytest.raises(ValueError, match="out of range"):
        sampling.logprobs(logits, np.array([0]), np.array([10]), 2)
    with pytest.raises(ValueError, match="not so many tokens"):
        sampling.logprobs(logits, np.array([0]), np.array([1]), 11)
    with pytest.raises(ValueError, match="out of range"):
        sampling.penalize(logits[0], np.array([10]), np.array([1]), 1.1, 0.0, 0.0)
    with pytest.raises(ValueError, match="one run"):
        sampling.choose(np.zeros((10, 2), np.float32).T, choice_of(2))


@pytest.mark.parametrize("isa", lesser_isa.LESSER)
def test_every_lesser_instruction_set_of_this_machine(isa: str) -> None:
    lesser_isa.check(__file__, isa, "not lesser")
