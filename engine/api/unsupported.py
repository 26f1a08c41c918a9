"""Known fields that this engine cannot honour: refused by name when they ask for something, never silently dropped.

A null and the field's default pass, because LMDeploy's proxy writes every field out.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Final

from engine.api.errors import InvalidRequest
from engine.api.openai import ChatRequest, CommonRequest, CompletionRequest

# What each field may hold besides null.
COMMON: Final[dict[str, Collection[Any]]] = {
    "use_beam_search": (False,),
    "beam_width": (1,),
    "length_penalty": (1.0,),
    "bad_words": ([],),
    "allowed_token_ids": ([],),
    "prompt_logprobs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "structured_outputs": (),
    "logits_processors": ([],),
}
CHAT: Final[dict[str, Collection[Any]]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "do_preprocess": (True,),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "mm_processor_kwargs": ({},),
    "documents": ([],),
    "chat_template": (),
}
COMPLETION: Final[dict[str, Collection[Any]]] = {"suffix": ("",)}


def refuse_unsupported(request: ChatRequest | CompletionRequest) -> None:
    """Raises InvalidRequest naming the first field that asks for what is not here."""
    own = CHAT if isinstance(request, ChatRequest) else COMPLETION
    for field, harmless in (COMMON | own).items():
        value = getattr(request, field)
        if value is not None and value not in harmless:
            raise InvalidRequest(f"{field} is not supported by this engine: leave it out", param=field)
    _refuse_shapes(request)


def _refuse_shapes(request: CommonRequest) -> None:
    shape = request.response_format
    if shape is not None and shape.type != "text":
        raise InvalidRequest(
            f"response_format of type {shape.type!r} is not supported by this engine: use 'text'",
            param="response_format",
        )
    if request.best_of is not None and request.best_of != (request.n or 1):
        raise InvalidRequest("best_of other than n is not supported by this engine", param="best_of")
