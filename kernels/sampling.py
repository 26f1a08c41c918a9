"""Tokens chosen from logits, a batch in one call. Native only: see kernels.cpu.NATIVE; `reference_sampling` is the
same in NumPy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kernels import _native
from kernels.choice import Choice
from kernels.kinds import Floats, Indices

__all__ = ["Choice", "Logprobs", "choose", "likeliest", "logprobs", "penalize"]


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Natural-log probabilities."""

    chosen: NDArray[np.float64]  # [rows]
    top_ids: Indices  # [rows, count], likeliest first, of equals the lower id
    top: NDArray[np.float64]  # [rows, count]


def likeliest(logits: Floats) -> Indices:
    """What `choose` gives at temperature 0, without a wish for each row: the largest logit's place in each row of
    [rows, vocab], the lowest of equals. Raises ValueError where there are no logits."""
    tokens = np.empty(len(logits), np.int64)
    _native.likeliest(logits, tokens)
    return tokens


def choose(logits: Floats, choice: Choice) -> Indices:
    """Token ids [rows] for logits [rows, vocab]: temperature, min-p, top-k and top-p in this order, then the token at
    which the weights, added up in order of token id, pass the uniform number's share. Of equals the lower id is the
    likelier. A row depends on nothing but itself. One whose largest logit is infinite gives the first such; one without
    a number gives 0. Rows may lie apart in memory. Raises ValueError where sizes do not fit."""
    tokens = np.empty(len(logits), np.int64)
    _native.choose(logits, choice.temperature, choice.min_p, choice.top_k, choice.top_p, choice.uniform, tokens)
    return tokens


def logprobs(logits: Floats, rows: Indices, tokens: Indices, count: int) -> Logprobs:
    """Of `tokens` [rows] and of the `count` likeliest, under the softmax of these `rows` of logits [any, vocab]. Raises
    ValueError for a row or token that is not there, and when there are fewer than `count` tokens."""
    found = Logprobs(
        np.empty(len(rows)),
        np.empty((len(rows), count), np.int64),
        np.empty((len(rows), count)),
    )
    _native.logprobs(logits, rows, tokens, found.chosen, found.top_ids, found.top)
    return found


def penalize(
    logits: Floats,  # [vocab], changed in place
    tokens: Indices,  # [distinct]
    counts: Indices,  # [distinct]: how often each is in the output
    repetition: float,  # divides a positive logit, multiplies another; 1: none
    presence: float,  # taken off a token that the output has
    frequency: float,  # taken off for each time that the output has it
) -> Floats:
    """Returns what the tokens' logits were [distinct]. Raises ValueError for a token that is not there."""
    before = np.empty(len(tokens), np.float32)
    _native.penalize(logits, tokens, counts, repetition, presence, frequency, before)
    return before
