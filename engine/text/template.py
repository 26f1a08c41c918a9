"""A conversation to the text a model was trained to continue."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Self

import jinja2

from engine.api.errors import InvalidRequest
from engine.text.jinja import environment

Message = dict[str, Any]

# Behind the message to continue while the template runs; the blank shows whether the template trims messages.
MARK: Final = "\ue000continue\ue000"

RESERVED: Final = frozenset(
    {
        "add_generation_prompt",
        "chat_template",
        "continue_final_message",
        "conversations",
        "documents",
        "messages",
        "return_assistant_tokens_mask",
        "tools",
    }
)
# Everything a template can do wrong to the values that a request brings.
TEMPLATE_FAILURES: Final = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)


class ChatTemplate:
    def __init__(self, source: str, named_tokens: Mapping[str, str]) -> None:
        """`named_tokens` are the template's `bos_token` and so on. Raises ValueError when `source` is no Jinja."""
        self._template = _compile(source)
        self._named_tokens = dict(named_tokens)

    @classmethod
    def choose(cls, chosen: str | None, own: str | None, named_tokens: Mapping[str, str]) -> Self | None:
        """The user's template (a file's name, or the template itself), else the model's own, if it has one."""
        source = _read(chosen) if chosen else own
        return cls(source, named_tokens) if source else None

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        arguments: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt's text. `arguments` are the request's chat_template_kwargs.

        Raises InvalidRequest when the template refuses the messages.
        """
        _check_arguments(arguments or {})
        given = [_with_reasoning(message) for message in messages]
        try:
            text = self._template.render(
                messages=_marked(given) if continue_final_message else given,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **{**self._named_tokens, **(arguments or {})},
            )
            return _before_mark(text) if continue_final_message else text
        except TEMPLATE_FAILURES as error:
            raise InvalidRequest(f"The chat template refuses these messages: {error}", param="messages") from error


def _compile(source: str) -> jinja2.Template:
    try:
        return environment().from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"The chat template is not valid Jinja (line {error.lineno}): {error.message}") from error


def _with_reasoning(message: Message) -> Message:
    """Templates read an answer's reasoning under one of two names."""
    reasoning = message.get("reasoning_content")
    return message if reasoning is None else {"thinking": reasoning, **message}


def _marked(messages: list[Message]) -> list[Message]:
    """The conversation with MARK behind its last text. Raises ValueError when there is none."""
    *before, last = messages or [{}]
    content = last.get("content")
    if isinstance(content, str):
        return [*before, {**last, "content": content + MARK + " "}]
    parts = list(content or ())
    place = max((i for i, part in enumerate(parts) if "text" in part), default=None)
    if place is None:
        raise ValueError("continue_final_message needs a final message with text")
    parts[place] = {**parts[place], "text": parts[place]["text"] + MARK + " "}
    return [*before, {**last, "content": parts}]


def _before_mark(text: str) -> str:
    """Raises ValueError when the template has left the marked end out."""
    before, mark, behind = text.rpartition(MARK)
    if not mark:
        raise ValueError("continue_final_message: it does not show the final message's end")
    return before if behind.startswith(" ") else before.rstrip()


def _check_arguments(arguments: Mapping[str, Any]) -> None:
    if reserved := sorted(RESERVED & arguments.keys()):
        raise InvalidRequest(
            f"chat_template_kwargs may not set {', '.join(reserved)}: use the request's own fields",
            param="chat_template_kwargs",
        )


def _read(chosen: str) -> str:
    if "{" in chosen or "\n" in chosen:
        return chosen
    try:
        return Path(chosen).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"The chat template {chosen!r} is neither a template nor a readable file: {error}") from error
