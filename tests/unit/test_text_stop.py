"""Stop strings are found wherever token borders fall, and no more is held back than must be."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.text.stop import StopMatcher

ALPHABET = "abc\n"
texts = st.text(ALPHABET, max_size=40)
stop_lists = st.lists(st.text(ALPHABET, min_size=1, max_size=6), min_size=1, max_size=4)


def run(pieces: list[str], stops: list[str], include_stop: bool = False) -> tuple[str, str | None]:
    matcher = StopMatcher(stops, include_stop)
    text = "".join(matcher.push(piece) for piece in pieces)
    return text + matcher.finish(), matcher.found


def first_stop(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The obvious version: the earliest end, and of those that end there the longest."""
    for end in range(1, len(text) + 1):
        ended = [stop for stop in stops if text[:end].endswith(stop)]
        if ended:
            longest = max(ended, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(st.lists(texts, max_size=8), stop_lists)
def test_cutting_the_text_differently_changes_nothing(pieces: list[str], stops: list[str]) -> None:
    assert run(pieces, stops) == first_stop("".join(pieces), stops)


@given(texts, stop_lists)
def test_holds_back_exactly_what_could_still_become_a_stop(text: str, stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    passed = matcher.push(text)
    if matcher.found is None:
        held = text[len(passed) :]
        longest = max(len(p) for stop in stops for p in (stop[:i] for i in range(len(stop))) if text.endswith(p))
        assert len(held) == longest


@pytest.mark.parametrize(("include", "expected"), [(False, "Answer: 42"), (True, "Answer: 42\nUser:")])
def test_a_stop_across_three_tokens_is_cut_or_kept(include: bool, expected: str) -> None:
    assert run(["Answer", ": 42", "\nUs", "er", ": more"], ["\nUser:"], include) == (expected, "\nUser:")


def test_text_that_only_began_like_a_stop_comes_out_at_the_end() -> None:
    matcher = StopMatcher(["\nUser:"])
    assert matcher.push("bye\nUse") == "bye"
    assert matcher.push("d") == "\nUsed"
    assert matcher.push("\nUs") == ""
    assert matcher.finish() == "\nUs"


def test_nothing_comes_after_a_stop() -> None:
    matcher = StopMatcher(["END"])
    assert matcher.push("xENDy") == "x"
    assert matcher.push("z") == ""
    assert matcher.finish() == ""
