"""Incremental decoding gives the text that decoding all at once gives, and never half a character."""

from __future__ import annotations

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models

from engine.text.detokenizer import Detokenizer, WindowDetokenizer
from engine.text.tokenizer import Tokenizer

SAMPLES = [
    "plain words, and 12345 numbers",
    "Grüße aus Köln — naïve café",
    "日本語のテキストと中文混排",
    "👩‍👩‍👧‍👦 family, 🏳️‍🌈 flag, 👍🏽 tone, 🇩🇪",
    "عربى ועברית हिन्दी ไทย",
    "a\u0301 e\u0301 combining, \U0001f9ff \U00020000 astral",
    "\t tabs\r\nand\n\n  leading   spaces  ",
    "\x00 nul \x7f \ufffd already replaced",
]
RANDOM_IDS = st.lists(st.integers(0, 49_151), max_size=60)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load("smollm2")


def pieces(detokenizer: Detokenizer, ids: list[int]) -> list[str]:
    return [*(detokenizer.push(token) for token in ids), detokenizer.finish()]


@pytest.mark.parametrize("text", SAMPLES)
def test_text_comes_back_whole(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert "".join(pieces(tokenizer.detokenizer(True), ids)) == text


def test_no_piece_holds_half_a_character(tokenizer: Tokenizer) -> None:
    text = "👩‍👩‍👧‍👦 日本 🏳️‍🌈"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) > len(text)  # several tokens for a character: the case this is about
    assert not any("\ufffd" in piece for piece in pieces(tokenizer.detokenizer(True), ids))


@given(st.text(max_size=80))
@settings(deadline=None)
def test_any_text_comes_back_whole(text: str) -> None:
    tokenizer = shared()
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert "".join(pieces(tokenizer.detokenizer(False), ids)) == tokenizer.decode(ids, False)


@given(RANDOM_IDS, st.booleans())
@settings(deadline=None)
def test_random_tokens_equal_decoding_at_once(ids: list[int], skip_special: bool) -> None:
    tokenizer = shared()
    assert "".join(pieces(tokenizer.detokenizer(skip_special), ids)) == tokenizer.decode(ids, skip_special)


def test_an_unfinished_character_is_replaced_at_the_end(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("🧿", add_special_tokens=False)
    assert len(ids) > 1
    assert pieces(tokenizer.detokenizer(True), ids[:-1]) == [""] * (len(ids) - 1) + ["\ufffd"]


def test_special_tokens_are_hidden_or_shown(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("<|im_start|>hi<|im_end|>", add_special_tokens=False)
    assert "".join(pieces(tokenizer.detokenizer(True), ids)) == "hi"
    assert "".join(pieces(tokenizer.detokenizer(False), ids)) == "<|im_start|>hi<|im_end|>"


def test_an_id_outside_the_vocabulary_is_silent(tokenizer: Tokenizer) -> None:
    assert pieces(tokenizer.detokenizer(True), [10**6, -1]) == ["", "", ""]


# A small sentencepiece-like vocabulary: a marked space before a word, and a token for every byte.
WORDS = ["\u2581", "\u2581Hello", "\u2581world", "!", "wo", "rld"]
PIECES = WORDS + [f"<0x{byte:02X}>" for byte in range(256)]


def sentencepiece() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE({piece: i for i, piece in enumerate(PIECES)}, [], byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return backend


def byte_pieces(text: str) -> list[int]:
    return [len(WORDS) + byte for byte in text.encode()]


@given(st.lists(st.sampled_from([[0], [1], [2], [3], [4, 5], byte_pieces("é"), byte_pieces("👍"), byte_pieces("日")])))
def test_sentencepiece_spaces_and_bytes_come_back_whole(runs: list[list[int]]) -> None:
    backend = sentencepiece()
    ids = [token for run in runs for token in run]
    parts = pieces(WindowDetokenizer(backend.decode), ids)
    assert "".join(parts) == backend.decode(ids)
    assert not any("\ufffd" in part for part in parts)


@given(st.lists(st.integers(0, len(PIECES) - 1), max_size=60))
def test_a_window_stays_short_whatever_comes(ids: list[int]) -> None:
    backend, longest = sentencepiece(), 0

    def decode(window: list[int]) -> str:
        nonlocal longest
        longest = max(longest, len(window))
        return backend.decode(window)

    pieces(WindowDetokenizer(decode), ids)
    assert longest <= 32


_shared: list[Tokenizer] = []


def shared() -> Tokenizer:
    """hypothesis and function fixtures do not mix; the vocabulary is read once."""
    if not _shared:
        _shared.append(Tokenizer.load("smollm2"))
    return _shared[0]
