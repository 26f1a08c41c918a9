"""What is read of a request, and what is spliced into it."""

from __future__ import annotations

import json

import pytest

from engine.api.distserve import MigrationRequest
from engine.api.errors import InvalidRequest
from kvtransfer.protocol import MigrationProtocol
from proxy.requests import Call, decode_body, prefill_body, read_prefill_reply, read_shape

MIGRATION = MigrationRequest(
    protocol=MigrationProtocol.RDMA,
    remote_engine_id="http://p:1",
    remote_session_id=0,
    remote_token_id=0,
    remote_block_ids=[],
)


def call(body: str) -> Call:
    return Call("/v1/completions", b"", body.encode(), True, read_shape(body.encode()))


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"m"', b'{"model": 5}', b"\xff\xfe", b'{"a": nope}', b"[" * 5000])
def test_what_is_no_json_object_with_a_model_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidRequest):
        read_shape(body)


def test_the_wrong_field_is_named() -> None:
    with pytest.raises(InvalidRequest) as refusal:
        read_shape(b'{"model": 5}')
    assert refusal.value.param == "model"


@pytest.mark.parametrize(
    "body",
    ["{}", '{"n": 1}', '{"n": null, "best_of": 1}', '{"prompt": "a"}', '{"prompt": [1, 2]}', '{"prompt": []}'],
)
def test_one_prompt_with_one_choice_is_single(body: str) -> None:
    assert call(body).single


@pytest.mark.parametrize("body", ['{"n": 2}', '{"best_of": 3}', '{"prompt": ["a", "b"]}', '{"prompt": [ [1], [2]]}'])
def test_several_prompts_or_choices_are_not(body: str) -> None:
    assert not call(body).single


def test_prefill_gets_one_token_no_stream_and_the_rest_as_it_was() -> None:
    body = b'{"model":"m","stream":true,"stream_options":{"include_usage":true},"max_tokens":99,"seed":1.50}'
    spliced = prefill_body(body, chat=False)
    assert json.loads(spliced) == {
        "model": "m",
        "stream": False,
        "stream_options": {"include_usage": True},
        "max_tokens": 1,
        "seed": 1.5,
        "with_cache": True,
        "preserve_cache": True,
    }
    assert b"1.50" in spliced  # untouched, to the byte
    assert json.loads(prefill_body(body, chat=True))["max_completion_tokens"] == 1


def test_decode_gets_the_whole_migration_request() -> None:
    spliced = json.loads(decode_body(b'{"model":"m"}', MIGRATION))
    assert spliced["migration_request"] == {
        "protocol": 2,
        "remote_engine_id": "http://p:1",
        "remote_session_id": 0,
        "remote_token_id": 0,
        "remote_block_ids": [],
        "is_dummy_prefill": False,
    }


def test_a_prefill_answer_becomes_a_hand_off() -> None:
    reply = read_prefill_reply(b'{"id":"7","cache_block_ids":[5,6],"remote_token_ids":[1,42],"choices":[]}')
    migration = reply.migration(MIGRATION)
    assert migration is not None
    assert (migration.remote_session_id, migration.remote_token_id) == (7, 42)
    assert migration.remote_block_ids == [5, 6]


@pytest.mark.parametrize(
    "body",
    [
        b'{"id":"chatcmpl-abc","remote_token_ids":[1]}',
        b'{"id":"-1","remote_token_ids":[1]}',
        '{"id":"²","remote_token_ids":[1]}'.encode(),
        b'{"id":"99999999999999999999","remote_token_ids":[1]}',
        b'{"id":"7","remote_token_ids":[]}',
        b'{"id":"7"}',
        b"{}",
        b"nonsense",
        b'{"id":{"a":1}}',
    ],
)
def test_an_answer_that_offers_no_hand_off_is_none(body: bytes) -> None:
    assert read_prefill_reply(body).migration(MIGRATION) is None
