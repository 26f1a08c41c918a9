"""From a request's fields to `core.SamplingParams`: the one place that knows defaults and limits."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import TypeVar

from engine.api.errors import InvalidRequest
from engine.api.openai import CommonRequest
from engine.core import ModelInfo, SamplingParams

MASK_64 = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15

Value = TypeVar("Value")


def sampling_params(
    request: CommonRequest, prompt_length: int, default_max_tokens: int | None, logprobs: int | None, model: ModelInfo
) -> SamplingParams:
    """Of one prompt's choices, but for the seed (see `choice_seed`). `prompt_length` in tokens.

    `default_max_tokens` None means as many as fit. Raises InvalidRequest.
    """
    max_tokens = _max_tokens(request, prompt_length, default_max_tokens, model)
    stops = () if request.ignore_eos else model.eos_token_ids
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=_min_tokens(request, max_tokens),
        seed=0,
        temperature=_or(request.temperature, 1.0),
        top_p=_or(request.top_p, 1.0),
        top_k=max(_or(request.top_k, 0), 0),
        min_p=_or(request.min_p, 0.0),
        repetition_penalty=_or(request.repetition_penalty, 1.0),
        presence_penalty=_or(request.presence_penalty, 0.0),
        frequency_penalty=_or(request.frequency_penalty, 0.0),
        logit_bias=_logit_bias(request.logit_bias or {}, model),
        stop_token_ids=tuple(dict.fromkeys((*stops, *_stop_token_ids(request, model)))),
        logprobs=logprobs,
    )


def draw_seed(request: CommonRequest, session: int | None) -> int:
    """The user's seed; else the hand-off's session, which both engines know; else chance."""
    if request.seed is not None:
        return request.seed
    return session if session is not None else secrets.randbits(63)


def choice_seed(seed: int, index: int) -> int:
    """Of sub-request `index`, the same on every engine: splitmix64, cut to 63 bits."""
    mixed = (seed + (index + 1) * GOLDEN) & MASK_64
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & MASK_64
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & MASK_64
    return (mixed ^ (mixed >> 31)) >> 1


def _or(value: Value | None, default: Value) -> Value:
    return default if value is None else value


def _max_tokens(request: CommonRequest, prompt_length: int, default: int | None, model: ModelInfo) -> int:
    room = model.max_model_len - prompt_length
    if prompt_length == 0:
        raise InvalidRequest("The prompt is empty: give at least one token", param="prompt")
    if room < 1:
        raise InvalidRequest(
            f"The prompt has {prompt_length} tokens, and this model holds {model.max_model_len}, prompt and answer "
            "together: shorten the prompt",
            param="prompt",
            code="context_length_exceeded",
        )
    asked = request.max_completion_tokens or request.max_tokens
    if asked is None:
        return room if default is None else min(default, room)
    if asked > room:
        raise InvalidRequest(
            f"The prompt has {prompt_length} tokens and max_tokens asks for {asked} more, and this model holds "
            f"{model.max_model_len}, prompt and answer together: ask for at most {room}",
            param="max_completion_tokens" if request.max_completion_tokens else "max_tokens",
            code="context_length_exceeded",
        )
    return asked


def _min_tokens(request: CommonRequest, max_tokens: int) -> int:
    min_tokens = _or(request.min_tokens, _or(request.min_new_tokens, 0))
    if min_tokens > max_tokens:
        raise InvalidRequest(f"min_tokens is {min_tokens} and max_tokens only {max_tokens}", param="min_tokens")
    return min_tokens


def _stop_token_ids(request: CommonRequest, model: ModelInfo) -> list[int]:
    for token in request.stop_token_ids or []:
        _check_token(token, model, "stop_token_ids")
    return request.stop_token_ids or []


def _logit_bias(given: Mapping[str, float], model: ModelInfo) -> dict[int, float]:
    bias = {}
    for key, value in given.items():
        if not (key.isascii() and key.isdigit() and len(key) <= 10):
            raise InvalidRequest(f"logit_bias: {key[:40]!r} is not a token id", param="logit_bias")
        _check_token(int(key), model, "logit_bias")
        bias[int(key)] = value
    return bias


def _check_token(token: int, model: ModelInfo, param: str) -> None:
    if token >= model.vocab_size:
        raise InvalidRequest(f"{param}: token {token} is outside the vocabulary of {model.vocab_size}", param=param)
