"""What clients may ask of /v1/chat/completions and /v1/completions. Answers are in `engine.api.answers`.

Every field may be null, which means its default: LMDeploy's proxy writes all fields out, nulls included. The first part
of each struct is honoured; `engine.api.unsupported` refuses the rest when it carries anything but its default.
"""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from engine.api.decoding import decode_json
from engine.api.distserve import MigrationRequest

MAX_CHOICES = 16
MAX_LOGPROBS = 20
MAX_STOPS = 64
MAX_STOP_LENGTH = 1024  # characters
MAX_PROMPTS = 256
INT64 = Meta(ge=-(2**63), le=2**63 - 1)

Count = Annotated[int, Meta(ge=1, le=2**31 - 1)]
NonNegative = Annotated[int, Meta(ge=0, le=2**31 - 1)]
TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Stop = Annotated[str, Meta(min_length=1, max_length=MAX_STOP_LENGTH)]
RequestId = Annotated[str, Meta(pattern=r"^[\x21-\x7e]{1,128}\Z")]
AnyObject = dict[str, Any]


class StreamOptions(msgspec.Struct, frozen=True, kw_only=True):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class ResponseFormat(msgspec.Struct, frozen=True, kw_only=True):
    type: str


class CommonRequest(msgspec.Struct, frozen=True, kw_only=True):
    """The fields of both."""

    model: str | None = None
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None  # wins over max_tokens
    min_tokens: NonNegative | None = None
    min_new_tokens: NonNegative | None = None  # LMDeploy's name of min_tokens
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None  # 0 and -1 are off
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    seed: Annotated[int, INT64] | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=10)] | None = None
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    logit_bias: dict[str, Annotated[float, Meta(ge=-100, le=100)]] | None = None
    stop: Stop | Annotated[list[Stop], Meta(max_length=MAX_STOPS)] | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=1024)] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None  # fast tokenizers put none, whatever is asked
    truncate_prompt_tokens: Count | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    user: str | None = None
    session_id: int | str | None = None
    request_id: RequestId | None = None
    priority: Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)] | None = None
    best_of: Annotated[int, Meta(ge=1)] | None = None

    with_cache: bool | None = None  # LMDeploy: answer with cache_block_ids and remote_token_ids
    preserve_cache: bool | None = None  # LMDeploy: hold the KV until it is freed
    migration_request: MigrationRequest | None = None

    use_beam_search: bool | None = None
    beam_width: int | None = None
    length_penalty: float | None = None
    bad_words: list[str] | None = None
    allowed_token_ids: list[int] | None = None
    prompt_logprobs: int | None = None
    response_format: ResponseFormat | None = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    structured_outputs: Any = None
    logits_processors: Any = None
    cache_salt: Annotated[str, Meta(max_length=256)] | None = None  # share prefixes only among requests of this salt


class ContentPart(msgspec.Struct, frozen=True, kw_only=True):
    type: str
    text: str | None = None


class ChatMessage(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    role: Annotated[str, Meta(min_length=1, max_length=64)]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[AnyObject] | None = None
    tool_call_id: str | None = None


class ChatRequest(CommonRequest, frozen=True, kw_only=True):
    messages: str | Annotated[list[ChatMessage], Meta(min_length=1)]  # a string is one message of the user
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: AnyObject | None = None
    enable_thinking: bool | None = None
    reasoning_effort: str | None = None
    parallel_tool_calls: bool | None = None  # says nothing without tools

    tools: list[AnyObject] | None = None
    tool_choice: str | AnyObject | None = None
    functions: list[AnyObject] | None = None
    function_call: str | AnyObject | None = None
    do_preprocess: bool | None = None
    modalities: list[str] | None = None
    audio: Any = None
    prediction: Any = None
    mm_processor_kwargs: AnyObject | None = None
    documents: list[AnyObject] | None = None
    chat_template: str | None = None


class CompletionRequest(CommonRequest, frozen=True, kw_only=True):
    # A text, texts, token ids, or lists of token ids; which of them is decided after decoding.
    prompt: str | Annotated[list[str | TokenId | list[TokenId]], Meta(min_length=1)]
    logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool | None = None

    suffix: str | None = None


Kind = TypeVar("Kind", bound=CommonRequest)


def decode_request(body: bytes, kind: type[Kind]) -> tuple[Kind, list[str]]:
    """The request, and the names of the fields that nobody here knows. Raises InvalidRequest."""
    given = decode_json(body, dict[str, msgspec.Raw])
    unknown = [name for name in given if name not in kind.__struct_fields__]
    return decode_json(body, kind), unknown
