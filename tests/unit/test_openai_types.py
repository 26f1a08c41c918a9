"""Whatever a body holds, it becomes valid parameters or one clear refusal."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.api.errors import InvalidRequest, TandemError, error_of
from engine.api.openai import ChatRequest, CompletionRequest, decode_request
from engine.api.sampling import choice_seed, sampling_params
from engine.api.sse import error_event, event
from engine.api.unsupported import CHAT, COMMON, COMPLETION, refuse_unsupported
from engine.core import ModelInfo, SamplingParams
from engine.server.completions import split_prompts
from tests.unit.fake_core import MODEL

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def some_fields(kind: type) -> st.SearchStrategy[dict[str, Any]]:
    return st.dictionaries(st.sampled_from(kind.__struct_fields__), JSON, max_size=5)  # type: ignore[attr-defined]


def params(model: ModelInfo = MODEL, prompt_length: int = 10, **fields: Any) -> SamplingParams:
    body = json.dumps({"prompt": "x", **fields}).encode()
    return sampling_params(decode_request(body, CompletionRequest)[0], prompt_length, 16, None, model)


@given(some_fields(CompletionRequest))
@settings(deadline=None)
def test_any_completion_body_is_valid_or_refused(fields: dict[str, Any]) -> None:
    body = json.dumps({"prompt": "x"} | fields).encode()
    try:
        request, _ = decode_request(body, CompletionRequest)
        refuse_unsupported(request)
        split_prompts(request)
        result = sampling_params(request, 10, 16, request.logprobs, MODEL)
    except InvalidRequest:
        return
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(result), type=SamplingParams) == result
    assert 1 <= result.max_tokens <= MODEL.max_model_len - 10
    assert 0 <= result.min_tokens <= result.max_tokens


@given(some_fields(ChatRequest))
@settings(deadline=None)
def test_any_chat_body_is_valid_or_refused(fields: dict[str, Any]) -> None:
    body = json.dumps({"messages": "x"} | fields).encode()
    try:
        request, _ = decode_request(body, ChatRequest)
        refuse_unsupported(request)
        result = sampling_params(request, 10, None, None, MODEL)
    except InvalidRequest:
        return
    assert 1 <= result.max_tokens <= MODEL.max_model_len - 10


@pytest.mark.parametrize("kind", [ChatRequest, CompletionRequest])
def test_every_field_may_be_null(kind: type[ChatRequest] | type[CompletionRequest]) -> None:
    nulls: dict[str, Any] = dict.fromkeys(kind.__struct_fields__)
    request, unknown = decode_request(json.dumps(nulls | {"messages": "x", "prompt": "x"}).encode(), kind)
    refuse_unsupported(request)
    assert unknown == (["prompt"] if kind is ChatRequest else ["messages"])


def test_the_refused_fields_are_fields() -> None:
    assert set(ChatRequest.__struct_fields__) >= COMMON.keys() | CHAT.keys()
    assert set(CompletionRequest.__struct_fields__) >= COMMON.keys() | COMPLETION.keys()


def test_defaults_are_openais() -> None:
    assert params() == SamplingParams(max_tokens=16, seed=0, stop_token_ids=(2,))


def test_what_is_asked_arrives() -> None:
    asked = params(
        max_tokens=9,
        min_tokens=2,
        temperature=0,
        top_p=0.5,
        top_k=-1,
        min_p=0.1,
        repetition_penalty=1.2,
        presence_penalty=-1,
        frequency_penalty=0.5,
        logit_bias={"7": -100},
        stop_token_ids=[9, 9, 2],
        ignore_eos=True,
    )
    assert asked == SamplingParams(
        max_tokens=9,
        min_tokens=2,
        seed=0,
        temperature=0.0,
        top_p=0.5,
        top_k=0,
        min_p=0.1,
        repetition_penalty=1.2,
        presence_penalty=-1.0,
        frequency_penalty=0.5,
        logit_bias={7: -100.0},
        stop_token_ids=(9, 2),
    )


def test_an_unset_length_is_cut_to_what_fits_and_an_explicit_one_is_not() -> None:
    assert params(prompt_length=505).max_tokens == 7
    assert params(prompt_length=505, max_tokens=7).max_tokens == 7
    with pytest.raises(InvalidRequest, match="ask for at most 7"):
        params(prompt_length=505, max_tokens=8)
    small_pool = msgspec.structs.replace(MODEL, max_model_len=32)
    assert params(small_pool, prompt_length=30).max_tokens == 2


def test_max_completion_tokens_wins() -> None:
    assert params(max_tokens=16, max_completion_tokens=50).max_tokens == 50


def test_choices_have_seeds_of_their_own() -> None:
    seeds = [choice_seed(seed, index) for seed in (0, 1, -1, 2**62) for index in range(4)]
    assert len(set(seeds)) == 16
    assert all(0 <= seed < 2**63 for seed in seeds)


@given(JSON)
def test_an_event_is_one_data_line(message: Any) -> None:
    line = event(message)
    assert line.startswith(b"data: ")
    assert line.endswith(b"\n\n")
    assert line.count(b"\n") == 2
    assert json.loads(line[6:]) == json.loads(json.dumps(message))


def test_an_error_event_is_what_openais_client_looks_for() -> None:
    assert json.loads(error_event(InvalidRequest("no", param="n"))[6:])["error"] == {
        "message": "no",
        "type": "invalid_request_error",
        "param": "n",
        "code": None,
    }


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 413, 429, 500, 503, 504])
def test_a_reported_status_stays(status: int) -> None:
    error = error_of(status, "said elsewhere")
    assert isinstance(error, TandemError)
    assert (error.status, error.message) == (status, "said elsewhere")
