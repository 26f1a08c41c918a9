"""A conversation to the text a model was trained to continue, through transformers' sandboxed Jinja."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

import jinja2

from engine.api.errors import InvalidRequest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Message = dict[str, Any]

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
    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """`special_tokens` are the template's `bos_token` and so on. Raises ValueError when `source` is no Jinja."""
        self._source = source
        self._special_tokens = dict(special_tokens)
        _check_syntax(source)

    @classmethod
    def choose(cls, chosen: str | None, fast: PreTrainedTokenizerFast) -> Self | None:
        """The user's template (a file's name, or the template itself), else the model's own, if it has one."""
        source = _read(chosen) if chosen else _own(fast)
        return cls(source, fast.special_tokens_map) if source else None

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
        from transformers.utils.chat_template_utils import render_jinja_template

        _check_arguments(arguments or {})
        try:
            rendered, _ = render_jinja_template(
                conversations=[list(messages)],
                chat_template=self._source,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                **{**self._special_tokens, **(arguments or {})},
            )
        except TEMPLATE_FAILURES as error:
            raise InvalidRequest(f"The chat template refuses these messages: {error}", param="messages") from error
        text: str = rendered[0]
        return text


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


def _own(fast: PreTrainedTokenizerFast) -> str | None:
    template = fast.chat_template
    return template.get("default") if isinstance(template, dict) else template


def _check_syntax(source: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        render_jinja_template(conversations=[], chat_template=source)  # compiles, and renders nothing
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"The chat template is not valid Jinja (line {error.lineno}): {error.message}") from error
