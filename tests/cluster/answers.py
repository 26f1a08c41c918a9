"""Answers as tests compare them, whole or put together from a stream."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import openai
from openai.types import Completion
from openai.types.completion_choice import Logprobs

from tests.cluster.local_cluster import MODEL


@dataclass(slots=True)
class Choice:
    """One choice of a completion."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprob_tokens: list[str] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str | None = None

    def add(self, text: str, token_ids: list[int], logprobs: Logprobs | None, finish_reason: str | None) -> None:
        assert self.finish_reason is None, "nothing may follow a finish reason"
        self.text += text
        self.token_ids += token_ids
        self.logprob_tokens += (logprobs.tokens if logprobs else None) or []
        self.logprobs += [value for value in (logprobs.token_logprobs if logprobs else None) or [] if value is not None]
        self.finish_reason = finish_reason


@dataclass(slots=True)
class Answer:
    """A whole answer of /v1/completions."""

    choices: list[Choice]
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int

    @property
    def text(self) -> str:
        (choice,) = self.choices
        return choice.text

    @property
    def token_ids(self) -> list[int]:
        (choice,) = self.choices
        return choice.token_ids

    @property
    def finish_reason(self) -> str | None:
        (choice,) = self.choices
        return choice.finish_reason


def complete(client: openai.OpenAI, prompt: Any, *, stream: bool = False, greedy: bool = True, **fields: Any) -> Answer:
    """`fields` are the body's, whoever invented them. A stream's usage is asked for, and must come last."""
    extra = {"return_token_ids": True} | ({"temperature": 0} if greedy else {}) | fields
    with client:
        if not stream:
            return _joined([client.completions.create(model=MODEL, prompt=prompt, extra_body=extra)])
        options = openai.types.chat.ChatCompletionStreamOptionsParam(include_usage=True)
        with client.completions.create(
            model=MODEL, prompt=prompt, stream=True, stream_options=options, extra_body=extra
        ) as chunks:
            return _joined(list(chunks))


def _joined(parts: Iterable[Completion]) -> Answer:
    choices: dict[int, Choice] = {}
    usage = None
    for part in parts:
        assert usage is None, "nothing may follow the usage"
        for piece in part.choices:
            ids = (piece.model_extra or {}).get("token_ids") or []
            choices.setdefault(piece.index, Choice()).add(piece.text, ids, piece.logprobs, piece.finish_reason)
        usage = part.usage
    assert usage is not None
    assert all(choice.finish_reason for choice in choices.values()), "every choice ends with a reason"
    details = usage.prompt_tokens_details
    cached = (details.cached_tokens if details else None) or 0
    ordered = [choices[index] for index in range(len(choices))]
    return Answer(ordered, usage.prompt_tokens, usage.completion_tokens, cached)
