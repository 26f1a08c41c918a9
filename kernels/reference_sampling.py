"""kernels.sampling, written the slow, obvious way."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kernels.choice import Choice
from kernels.kinds import Floats, Indices

Weights = NDArray[np.float64]


def choose(logits: Floats, choice: Choice) -> Indices:
    """See kernels.sampling.choose. For rows whose largest logit is finite."""
    return np.array([_choose(row, choice, number) for number, row in enumerate(logits)], np.int64)


def logprobs(logits: Floats, rows: Indices, tokens: Indices, count: int) -> tuple[Weights, Indices, Weights]:
    """See kernels.sampling.logprobs: of the tokens, then ids and log-probabilities of the likeliest."""
    exact = logits[rows].astype(np.float64)
    exact -= exact.max(axis=-1, keepdims=True)
    exact -= np.log(np.exp(exact).sum(axis=-1, keepdims=True))
    ids = np.argsort(-logits[rows], axis=-1, kind="stable")[:, :count]
    return np.take_along_axis(exact, tokens[:, None], -1)[:, 0], ids, np.take_along_axis(exact, ids, -1)


def _choose(logits: Floats, choice: Choice, row: int) -> int:
    if choice.temperature[row] == 0:
        return int(logits.argmax())
    return pick(kept_weights(logits, choice, row), float(choice.uniform[row]))


def kept_weights(logits: Floats, choice: Choice, row: int) -> Weights:
    """[vocab], the likeliest token's is 1; 0 for what is cut."""
    scaled = logits / choice.temperature[row]
    weights = np.exp(scaled - scaled.max())  # float32
    weights[weights < choice.min_p[row]] = 0
    order = np.argsort(-scaled, kind="stable")  # likeliest first, of equals the lower id
    ranked = weights[order].astype(np.float64)
    if choice.top_k[row] > 0:
        ranked[choice.top_k[row] :] = 0
    if choice.top_p[row] < 1:
        before = np.cumsum(ranked) - ranked
        before[0] = -1  # the likeliest token is always in
        ranked[before >= choice.top_p[row] * ranked.sum()] = 0
    kept: Weights = np.empty(len(logits))
    kept[order] = ranked
    return kept


def pick(weights: Weights, uniform: float) -> int:
    """The first whose cumulative weight is above this share of all; never one of weight 0."""
    cumulative = np.cumsum(weights)
    target = min(uniform * cumulative[-1], np.nextafter(cumulative[-1], 0))
    return int(np.searchsorted(cumulative, target, side="right"))
