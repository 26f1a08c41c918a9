"""What a request wants of its logits before a token is drawn from them."""

from __future__ import annotations

from engine.core import Row, SamplingParams

GREEDY_BELOW = 1e-5  # a temperature that small is 0: dividing by it would overflow


def changes_logits(row: Row) -> bool:
    sampling = row.request.sampling
    return bool(sampling.logit_bias) or forbids_stops(row) or penalizes(sampling)


def wants_likeliest(row: Row) -> bool:
    """And nothing else: no logit is changed, none is told."""
    sampling = row.request.sampling
    return sampling.temperature < GREEDY_BELOW and sampling.logprobs is None and not changes_logits(row)


def forbids_stops(row: Row) -> bool:
    return row.num_output < row.request.sampling.min_tokens


def penalizes(sampling: SamplingParams) -> bool:
    return sampling.repetition_penalty != 1.0 or sampling.presence_penalty != 0.0 or sampling.frequency_penalty != 0.0
