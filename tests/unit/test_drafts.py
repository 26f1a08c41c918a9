"""What may follow is read off the text; what is checked in one step changes no answer and keeps no block."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.core import Sequence
from engine.drafts import RUNS, Drafter, Echo
from tests.unit.toy_engines import Clock, ToyEngine, expected_answer, toy_request

# Some differ by whole bytes only, so that one's end and the next one's start look like a third.
TOKENS = st.lists(st.sampled_from([0, 1, 1 << 8, 1 << 16, 1 << 24, (1 << 32) - 1]), min_size=1, max_size=40)


def reference(tokens: list[int], length: int) -> list[int]:
    """The same, looked up token by token."""
    for run in RUNS:
        for start in range(len(tokens) - run - 1, -1, -1):
            if tokens[start : start + run] == tokens[-run:]:
                grown = list(tokens)
                while len(grown) < len(tokens) + length:
                    grown.append(grown[start + run + len(grown) - len(tokens)])
                return grown[len(tokens) :]
    return []


def draft(tokens: list[int], most: int = 8, num_accepted: int = 8) -> list[int]:
    echo = Echo()
    echo.settle(num_accepted)
    return echo.draft(tokens, most)


@given(TOKENS, st.integers(1, 8))
def test_the_text_is_searched_as_tokens(tokens: list[int], most: int) -> None:
    assert draft(tokens, most) == reference(tokens, most)


@given(TOKENS, st.data())
def test_a_text_may_grow_by_any_number_of_tokens(tokens: list[int], data: st.DataObject) -> None:
    echo, seen = Echo(), 0
    while seen < len(tokens):
        seen += data.draw(st.integers(1, len(tokens) - seen))
        assert echo.draft(tokens[:seen], 1) == reference(tokens[:seen], 1)


def test_the_longest_run_counts_and_of_those_the_last() -> None:
    assert draft([1, 2, 3, 70, 1, 2, 3, 80, 2, 3, 90, 1, 2, 3], most=1) == [80]


def test_what_repeats_is_expected_to_go_on() -> None:
    assert draft([9, 5, 6, 5, 6, 5, 6], most=5) == [5, 6, 5, 6, 5]


def test_a_text_without_repetition_has_no_draft() -> None:
    assert draft([1, 2, 3, 4, 5, 3]) == []


def test_a_draft_is_as_long_as_the_last_one_was_right() -> None:
    echo, tokens = Echo(), [7] * 40
    lengths = []
    for num_accepted in (1, 2, 4, 8, 3, 0, 0):
        lengths.append(len(echo.draft(tokens, 15)))
        echo.settle(num_accepted)
    assert lengths == [1, 2, 4, 8, 15, 6, 1]


def sequence(max_tokens: int, **wishes: Any) -> Sequence:
    request = toy_request("one", [7] * 6, max_tokens)
    sampling = msgspec.structs.replace(request.sampling, **wishes)
    return Sequence.of(msgspec.structs.replace(request, sampling=sampling), 0.0)


def test_no_more_is_drafted_than_the_answer_has_room_for() -> None:
    drafter = Drafter(15)
    one = sequence(max_tokens=3)
    drafter.draft(one, 8)
    drafter.settle(one, 8, 8)
    assert len(drafter.draft(one, 8)) == 2  # the third token needs no draft
    assert drafter.draft(sequence(max_tokens=1), 8) == []


@pytest.mark.parametrize("wish", ["repetition_penalty", "presence_penalty", "frequency_penalty"])
def test_nothing_is_drafted_where_repetition_is_penalized(wish: str) -> None:
    assert Drafter(15).draft(sequence(9, **{wish: 1.5}), 8) == []


def test_a_drafter_may_be_told_to_draft_nothing() -> None:
    assert Drafter(0).draft(sequence(9), 8) == []


def answers(engine: ToyEngine, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
    for index, prompt in enumerate(prompts):
        engine.submit(toy_request(str(index), prompt, max_tokens))
    while engine.step():
        pass
    return [engine.answers[str(index)].tokens for index in range(len(prompts))]


@given(
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=12), min_size=1, max_size=6),
    st.integers(1, 30),
    st.integers(11, 40),
    st.sampled_from([1, 4, 16]),
)
def test_answers_are_what_they_would_be_without_drafts(
    prompts: list[list[int]], max_tokens: int, num_blocks: int, block_size: int
) -> None:
    """Also where the pool is so small that sequences take blocks from one another."""
    engine = ToyEngine("toy", Clock(), max(num_blocks, -(-44 // block_size)), block_size, budget=8)
    assert answers(engine, prompts, max_tokens) == [expected_answer(prompt, max_tokens) for prompt in prompts]
    assert engine.engine.scheduler.pool.num_free == engine.layout.num_blocks


def test_drafts_save_steps() -> None:
    engine = ToyEngine("toy", Clock(), 32, 4, budget=8)
    answers(engine, [[1, 2, 3, 1, 2, 3]], 60)
    drafter = engine.engine.scheduler.drafter
    assert engine.engine.steps == 60 - drafter.num_accepted
    assert 0 < drafter.num_accepted < drafter.num_drafted


def test_an_answer_ends_at_its_stop_token_though_more_was_drafted() -> None:
    prompt = [1, 2, 3, 1, 2, 3]
    answer = expected_answer(prompt, 60)
    stop = answer[30]
    engine = ToyEngine("toy", Clock(), 32, 4, budget=8)
    request = toy_request("one", prompt, 60)
    sampling = msgspec.structs.replace(request.sampling, stop_token_ids=(stop,))
    engine.submit(msgspec.structs.replace(request, sampling=sampling))
    while engine.step():
        pass
    assert engine.answers["one"].tokens == answer[: answer.index(stop) + 1]
