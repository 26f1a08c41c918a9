"""Token ids to text, one token at a time, never splitting a character."""

from __future__ import annotations

import codecs
from collections.abc import Callable
from typing import Final, Protocol

REPLACEMENT: Final = "\ufffd"
MAX_PENDING_TOKENS: Final = 16  # no character needs more byte tokens than this; past it the text is broken anyway


class Detokenizer(Protocol):
    def push(self, token: int) -> str:
        """The characters that this token completes; often all of its text, "" in the middle of a character."""

    def finish(self) -> str:
        """What is left when no more tokens come: U+FFFD for a character that never completed."""


class ByteDetokenizer:
    """For byte-level vocabularies: a token is a run of bytes, and text is their UTF-8. Equals decoding all at once."""

    def __init__(self, token_bytes: Callable[[int], bytes]) -> None:
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        return self._decoder.decode(self._token_bytes(token))

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class WindowDetokenizer:
    """For every other vocabulary, whose decoders look at neighbours (leading spaces, byte fallback).

    Decodes a short window twice, without and with the new tokens, and passes on the difference. The window starts one
    completed run earlier, so that a leading space is treated as in the middle of a text.

        tokens   ....... | context | pending |
                         ^prefix   ^read
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._context: list[int] = []
        self._pending: list[int] = []
        self._context_text = ""

    def push(self, token: int) -> str:
        self._pending.append(token)
        text = self._decode(self._context + self._pending)
        incomplete = text.endswith(REPLACEMENT) and len(self._pending) < MAX_PENDING_TOKENS
        # A token without text (a hidden special one) must stay pending, or it would become an empty context.
        if incomplete or (len(text) <= len(self._context_text) and len(self._pending) < MAX_PENDING_TOKENS):
            return ""
        return self._advance(text)

    def finish(self) -> str:
        return self._advance(self._decode(self._context + self._pending)) if self._pending else ""

    def _advance(self, text: str) -> str:
        fresh = text[len(self._context_text) :]
        self._context, self._pending = self._pending, []
        self._context_text = self._decode(self._context)
        return fresh
