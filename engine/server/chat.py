"""POST /v1/chat/completions."""

from __future__ import annotations

import asyncio
import time
import uuid
from typing import Any, Final

import msgspec
from aiohttp import web

from engine.api.answers import (
    AssistantMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    ContentLogprob,
    TopLogprob,
    Usage,
)
from engine.api.errors import InvalidRequest
from engine.api.openai import ChatMessage, ChatRequest, ContentPart, decode_request
from engine.api.unsupported import refuse_unsupported
from engine.core import TokenLogprobs
from engine.server.answering import answer
from engine.server.body import read_body
from engine.server.choice import Piece
from engine.server.encoding import encode_prompts
from engine.server.handoff import handoff_of
from engine.server.job import Job, make_job
from engine.server.logprobs import finite
from engine.server.objectives import objectives_of
from engine.server.service import SERVICE, Service, adopt_request_id
from engine.text.template import Message
from engine.text.vocabulary import Vocabulary

LONG_BODY_BYTES: Final = 65_536  # some ten milliseconds of many short messages


async def chat_completions(request: web.Request) -> web.StreamResponse:
    service = request.app[SERVICE]
    body = await read_body(request)
    fields, ignored = decode_request(body, ChatRequest)
    adopt_request_id(request, fields.request_id)
    service.check_model(fields.model)
    refuse_unsupported(fields)
    handoff = handoff_of(request, fields)
    text = await _rendered(service, fields, len(body))
    prompts = await encode_prompts(service, [text], add_special_tokens=False)
    job = make_job(
        service,
        fields,
        prompts,
        default_max_tokens=None,
        logprobs=_logprobs(fields),
        handoff=handoff,
        objectives=objectives_of(request, service.settings),
        ignored_fields=ignored,
    )
    return await answer(request, job, ChatShape(service, fields, job))


def _logprobs(fields: ChatRequest) -> int | None:
    if fields.logprobs:
        return fields.top_logprobs or 0
    if fields.top_logprobs:
        raise InvalidRequest("top_logprobs needs logprobs: true", param="top_logprobs")
    return None


async def _rendered(service: Service, fields: ChatRequest, body_bytes: int) -> str:
    """In a thread when there is so much that the template could hold up the event loop."""
    if body_bytes < LONG_BODY_BYTES:
        return _render(service, fields)
    return await asyncio.to_thread(_render, service, fields)


def _render(service: Service, fields: ChatRequest) -> str:
    template = service.tokenizer.template
    if template is None:
        raise InvalidRequest(
            "This model has no chat template: use /v1/completions, or serve it with --chat-template", param="messages"
        )
    continues = bool(fields.continue_final_message)
    if continues and fields.add_generation_prompt:
        raise InvalidRequest(
            "continue_final_message and add_generation_prompt exclude each other", param="continue_final_message"
        )
    generates = not continues if fields.add_generation_prompt is None else fields.add_generation_prompt
    return template.render(
        _messages(fields),
        add_generation_prompt=generates,
        continue_final_message=continues,
        arguments=_template_arguments(fields),
    )


def _template_arguments(fields: ChatRequest) -> dict[str, Any]:
    arguments = dict(fields.chat_template_kwargs or {})
    if fields.enable_thinking is not None:
        arguments["enable_thinking"] = fields.enable_thinking
    if fields.reasoning_effort is not None:
        arguments["reasoning_effort"] = fields.reasoning_effort
    return arguments


def _messages(fields: ChatRequest) -> list[Message]:
    if isinstance(fields.messages, str):
        return [{"role": "user", "content": fields.messages}]
    return [_message(i, message) for i, message in enumerate(fields.messages)]


def _message(i: int, message: ChatMessage) -> Message:
    content = message.content
    if isinstance(content, list):
        content = "\n".join(_text(f"messages[{i}].content[{j}]", part) for j, part in enumerate(content))
    fields: Message = msgspec.to_builtins(message)
    return fields | {"content": content or ""}


def _text(path: str, part: ContentPart) -> str:
    if part.type != "text":
        raise InvalidRequest(f"{path}: this model reads text only, not parts of type {part.type[:40]!r}", param=path)
    if part.text is None:
        raise InvalidRequest(f"{path}: a text part needs `text`", param=path)
    return part.text


class ChatShape:
    """OpenAI's chat shapes."""

    def __init__(self, service: Service, fields: ChatRequest, job: Job) -> None:
        self._vocabulary = service.tokenizer.vocabulary
        self._job = job
        self._shows_ids = bool(fields.return_token_ids)
        self._expects_usage = bool(fields.stream_options and fields.stream_options.include_usage)
        self._head: dict[str, Any] = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": service.model_name,
            "system_fingerprint": service.fingerprint,
        }

    def opening(self, index: int) -> ChatChunk:
        choice = ChatChunkChoice(index=index, delta=ChatDelta(role="assistant", content=""))
        prompt = self._job.prompts[0] if self._shows_ids and index == 0 else msgspec.UNSET
        return self._chunk([choice], None, prompt)

    def chunk(self, index: int, piece: Piece, usage: Usage | None) -> ChatChunk | None:
        if not (piece.text or piece.finish_reason or piece.logprobs or self._shows_ids or usage):
            return None
        choice = ChatChunkChoice(
            index=index,
            delta=ChatDelta(content=piece.text) if piece.text else ChatDelta(),
            logprobs=self._logprobs(piece),
            finish_reason=piece.finish_reason,
            token_ids=piece.tokens if self._shows_ids else msgspec.UNSET,
        )
        return self._chunk([choice], usage)

    def closing(self, usage: Usage) -> ChatChunk:
        return self._chunk([], usage)

    def whole(self, pieces: list[Piece], usage: Usage) -> ChatCompletion:
        choices = [
            ChatChoice(
                index=index,
                message=AssistantMessage(content=piece.text),
                logprobs=self._logprobs(piece),
                finish_reason=piece.finish_reason or "",
                token_ids=piece.tokens if self._shows_ids else msgspec.UNSET,
            )
            for index, piece in enumerate(pieces)
        ]
        prompt = self._job.prompts[0] if self._shows_ids else msgspec.UNSET
        return ChatCompletion(**self._head, choices=choices, usage=usage, prompt_token_ids=prompt)

    def _chunk(
        self,
        choices: list[ChatChunkChoice],
        usage: Usage | None,
        prompt: list[int] | msgspec.UnsetType = msgspec.UNSET,
    ) -> ChatChunk:
        shown = usage if usage is not None or self._expects_usage else msgspec.UNSET
        return ChatChunk(**self._head, choices=choices, usage=shown, prompt_token_ids=prompt)

    def _logprobs(self, piece: Piece) -> ChatLogprobs | None:
        if not piece.logprobs:
            return None
        pairs = zip(piece.tokens, piece.logprobs, strict=True)
        return ChatLogprobs([_content_logprob(self._vocabulary, token, entry) for token, entry in pairs])


def _content_logprob(vocabulary: Vocabulary, token: int, entry: TokenLogprobs) -> ContentLogprob:
    rivals = zip(entry.top_ids, entry.top_logprobs, strict=True)
    return ContentLogprob(
        token=vocabulary.token_text(token),
        logprob=finite(entry.logprob),
        bytes=list(vocabulary.token_bytes(token)),
        top_logprobs=[
            TopLogprob(
                token=vocabulary.token_text(rival), logprob=finite(logprob), bytes=list(vocabulary.token_bytes(rival))
            )
            for rival, logprob in rivals
        ],
    )
