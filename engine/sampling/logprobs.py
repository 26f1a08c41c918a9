"""Log-probabilities for the user: log of the softmax of the raw logits, before bias, penalties and temperature."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.core import TokenLogprobs
from engine.sampling.draw import largest


def token_logprobs(logits: Tensor, tokens: Tensor, wanted: Sequence[int | None]) -> list[TokenLogprobs | None]:
    """For raw logits [rows, vocab] and chosen tokens [rows]. `wanted` is each row's `SamplingParams.logprobs`."""
    found: list[TokenLogprobs | None] = [None] * len(wanted)
    rows = [row for row, count in enumerate(wanted) if count is not None]
    if not rows:
        return found
    scores = torch.log_softmax(logits[rows].float(), dim=-1)  # [rows that want, vocab]
    chosen = scores.gather(-1, tokens[rows, None]).squeeze(1).tolist()
    top_ids, top_scores = _top(scores, max(count or 0 for count in wanted))
    for place, row in enumerate(rows):
        count = wanted[row] or 0
        found[row] = TokenLogprobs(chosen[place], top_ids[place][:count], top_scores[place][:count])
    return found


def _top(scores: Tensor, count: int) -> tuple[list[list[int]], list[list[float]]]:
    if count == 0:
        return [[]] * len(scores), [[]] * len(scores)
    ids = largest(scores, min(count, scores.shape[-1]))
    return ids.tolist(), scores.gather(-1, ids).tolist()
