"""POST /v1/completions."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any, Final

import msgspec
from aiohttp import web

from engine.api.answers import Completion, CompletionChoice, CompletionLogprobs, Usage
from engine.api.errors import InvalidRequest
from engine.api.openai import MAX_PROMPTS, CompletionRequest, decode_request
from engine.api.unsupported import refuse_unsupported
from engine.core import TokenLogprobs
from engine.server.answering import answer
from engine.server.body import read_body
from engine.server.choice import Piece
from engine.server.encoding import check_token_ids, encode_prompts
from engine.server.handoff import handoff_of
from engine.server.job import Job, make_job
from engine.server.logprobs import finite
from engine.server.objectives import objectives_of
from engine.server.service import SERVICE, Service, adopt_request_id
from engine.text.vocabulary import Vocabulary

DEFAULT_MAX_TOKENS: Final = 16  # OpenAI's


async def completions(request: web.Request) -> web.StreamResponse:
    service = request.app[SERVICE]
    fields, ignored = decode_request(await read_body(request), CompletionRequest)
    adopt_request_id(request, fields.request_id)
    service.check_model(fields.model)
    refuse_unsupported(fields)
    _check_echo(fields)
    handoff = handoff_of(request, fields)
    prompts = await _encode(service, split_prompts(fields))
    job = make_job(
        service,
        fields,
        prompts,
        default_max_tokens=DEFAULT_MAX_TOKENS,
        logprobs=fields.logprobs,
        handoff=handoff,
        objectives=objectives_of(request, service.settings),
        ignored_fields=ignored,
    )
    return await answer(request, job, CompletionShape(service, fields, job))


def split_prompts(fields: CompletionRequest) -> list[str | list[int]]:
    """One prompt or several; a text or token ids each. Raises InvalidRequest for a mixture."""
    given = fields.prompt
    if isinstance(given, str):
        return [given]
    ids = [item for item in given if isinstance(item, int)]
    if len(ids) == len(given):
        return [ids]
    prompts = [item for item in given if not isinstance(item, int)]
    if len(prompts) != len(given) or len({type(prompt) for prompt in prompts}) != 1:
        raise InvalidRequest("prompt is a text, texts, token ids, or lists of token ids, not a mixture", param="prompt")
    if len(prompts) > MAX_PROMPTS:
        raise InvalidRequest(f"prompt: at most {MAX_PROMPTS} prompts in a request", param="prompt")
    return prompts


async def _encode(service: Service, prompts: Sequence[str | list[int]]) -> list[list[int]]:
    ids = [check_token_ids(service, prompt) for prompt in prompts if isinstance(prompt, list)]
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    return ids or await encode_prompts(service, texts, add_special_tokens=True)


def _check_echo(fields: CompletionRequest) -> None:
    if fields.echo and fields.logprobs is not None:
        raise InvalidRequest("echo with logprobs is not supported by this engine: ask for one of them", param="echo")


class CompletionShape:
    """OpenAI's completion shapes; a chunk looks like a whole answer."""

    def __init__(self, service: Service, fields: CompletionRequest, job: Job) -> None:
        self._tokenizer = service.tokenizer
        self._job = job
        self._echoes = bool(fields.echo)
        self._shows_ids = bool(fields.return_token_ids)
        self._expects_usage = bool(fields.stream_options and fields.stream_options.include_usage)
        self._head: dict[str, Any] = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": service.model_name,
            "system_fingerprint": service.fingerprint,
        }

    def opening(self, index: int) -> Completion | None:
        if not (self._echoes or self._shows_ids):
            return None
        choice = CompletionChoice(
            index=index,
            text=self._echo(index),
            logprobs=None,
            finish_reason=None,
            token_ids=[] if self._shows_ids else msgspec.UNSET,
            prompt_token_ids=self._prompt_ids(index),
        )
        return self._chunk([choice], None)

    def chunk(self, index: int, piece: Piece, usage: Usage | None) -> Completion | None:
        if not (piece.text or piece.finish_reason or piece.logprobs or self._shows_ids or usage):
            return None
        choice = CompletionChoice(
            index=index,
            text=piece.text,
            logprobs=self._logprobs(piece),
            finish_reason=piece.finish_reason,
            token_ids=piece.tokens if self._shows_ids else msgspec.UNSET,
        )
        return self._chunk([choice], usage)

    def closing(self, usage: Usage) -> Completion:
        return self._chunk([], usage)

    def whole(self, pieces: list[Piece], usage: Usage) -> Completion:
        choices = [
            CompletionChoice(
                index=index,
                text=self._echo(index) + piece.text,
                logprobs=self._logprobs(piece),
                finish_reason=piece.finish_reason,
                token_ids=piece.tokens if self._shows_ids else msgspec.UNSET,
                prompt_token_ids=self._prompt_ids(index),
            )
            for index, piece in enumerate(pieces)
        ]
        return Completion(**self._head, choices=choices, usage=usage)

    def _chunk(self, choices: list[CompletionChoice], usage: Usage | None) -> Completion:
        shown = usage if usage is not None or self._expects_usage else msgspec.UNSET
        return Completion(**self._head, choices=choices, usage=shown)

    def _echo(self, index: int) -> str:
        return self._tokenizer.decode(self._job.prompt_of(index), skip_special_tokens=True) if self._echoes else ""

    def _prompt_ids(self, index: int) -> list[int] | msgspec.UnsetType:
        return self._job.prompt_of(index) if self._shows_ids else msgspec.UNSET

    def _logprobs(self, piece: Piece) -> CompletionLogprobs | None:
        return _completion_logprobs(self._tokenizer.vocabulary, piece) if piece.logprobs else None


def _completion_logprobs(vocabulary: Vocabulary, piece: Piece) -> CompletionLogprobs:
    pairs = list(zip(piece.tokens, piece.logprobs, strict=True))
    return CompletionLogprobs(
        tokens=[vocabulary.token_key(token) for token in piece.tokens],
        token_logprobs=[finite(entry.logprob) for entry in piece.logprobs],
        top_logprobs=[_top(vocabulary, token, entry) for token, entry in pairs],
        text_offset=piece.offsets,
    )


def _top(vocabulary: Vocabulary, token: int, entry: TokenLogprobs) -> dict[str, float]:
    """The likeliest tokens, and the chosen one where it is not among them."""
    rivals = {
        vocabulary.token_key(rival): finite(logprob)
        for rival, logprob in zip(entry.top_ids, entry.top_logprobs, strict=True)
    }
    return rivals | {vocabulary.token_key(token): finite(entry.logprob)}
