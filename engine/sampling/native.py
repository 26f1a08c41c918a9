"""One call from logits to tokens, for a whole batch of requests that each want something else; without torch.

`engine.sampling.sampler` is the same on torch: what this is tested against, and what CUDA uses.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from engine.core import Row, StepOutput, TokenLogprobs
from engine.sampling.borrowed import adjusted
from engine.sampling.randomness import uniforms
from engine.sampling.wishes import GREEDY_BELOW, wants_likeliest
from kernels.sampling import Choice, choose, likeliest, logprobs

Logits = NDArray[np.float32]
Tokens = NDArray[np.int64]


def sample(logits: Logits, rows: Sequence[Row]) -> StepOutput:
    """`logits` [rows, vocab], one for each sequence that samples, are as they were when this returns; meanwhile they
    may be changed."""
    if all(map(wants_likeliest, rows)):
        return StepOutput(likeliest(logits).tolist(), [None] * len(rows))
    with adjusted(logits, rows):
        tokens = choose(logits, _choice(rows))  # [rows]
    return StepOutput(tokens.tolist(), _token_logprobs(logits, tokens, rows))


def _choice(rows: Sequence[Row]) -> Choice:
    wishes = [row.request.sampling for row in rows]
    return Choice(
        temperature=np.array([_or_greedy(wish.temperature) for wish in wishes], np.float32),
        min_p=np.array([wish.min_p for wish in wishes], np.float32),
        top_k=np.array([wish.top_k for wish in wishes], np.int64),
        top_p=np.array([wish.top_p for wish in wishes], np.float64),
        uniform=uniforms([wish.seed for wish in wishes], [row.num_output for row in rows]),
    )


def _or_greedy(temperature: float) -> float:
    return temperature if temperature >= GREEDY_BELOW else 0.0


def _token_logprobs(logits: Logits, tokens: Tokens, rows: Sequence[Row]) -> list[TokenLogprobs | None]:
    """Of the raw logits: before bias, penalties and temperature."""
    counts = [row.request.sampling.logprobs for row in rows]
    wanted = [(number, count) for number, count in enumerate(counts) if count is not None]
    output: list[TokenLogprobs | None] = [None] * len(rows)
    if not wanted:
        return output
    most = min(max(count for _, count in wanted), logits.shape[1])
    numbers = np.array([number for number, _ in wanted], np.int64)
    found = logprobs(logits, numbers, tokens[numbers], most)
    chosen, top_ids, top = found.chosen.tolist(), found.top_ids.tolist(), found.top.tolist()
    for place, (number, count) in enumerate(wanted):
        output[number] = TokenLogprobs(chosen[place], top_ids[place][:count], top[place][:count])
    return output
