"""What each token id stands for, as text and as bytes."""

from __future__ import annotations

import re
from functools import cached_property
from typing import Final

import tokenizers
from tokenizers import decoders

REPLACEMENT: Final = "\ufffd"
SPACE_MARK: Final = "\u2581"  # how sentencepiece writes a space
BYTE_PIECE: Final = re.compile(r"<0x([0-9A-F]{2})>")


def byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable Latin-1 characters stand for themselves, U+0100 and on for the rest."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


BYTE_ALPHABET: Final = byte_alphabet()


class Vocabulary:
    """One tokenizer's tokens. Spellings are worked out on first use and kept."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        self._special_ids = frozenset(id for id, added in backend.get_added_tokens_decoder().items() if added.special)
        self._bytes: dict[int, bytes] = {}
        self.is_byte_level = isinstance(backend.decoder, decoders.ByteLevel)

    @cached_property
    def size(self) -> int:
        """Added tokens included; a model's logits may be wider still."""
        return int(self._backend.get_vocab_size())

    def token_bytes(self, token: int) -> bytes:
        """The bytes the token adds in the middle of a text; none for an id that the vocabulary does not have."""
        known = self._bytes.get(token)
        if known is None:
            known = self._bytes[token] = self._spell(token)
        return known

    def visible_bytes(self, token: int) -> bytes:
        """`token_bytes`, but none for special tokens."""
        return b"" if token in self._special_ids else self.token_bytes(token)

    def token_text(self, token: int) -> str:
        """For people: U+FFFD where the token is only a part of a character."""
        return self.token_bytes(token).decode("utf-8", "replace")

    def token_key(self, token: int) -> str:
        """A text that tells tokens apart: OpenAI's `bytes:\\xe2\\x80` for a part of a character."""
        spelled = self.token_bytes(token)
        text = spelled.decode("utf-8", "replace")
        return text if REPLACEMENT not in text else "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)

    def least_tokens(self, text: str) -> int:
        """A lower bound of how many tokens `text` takes, at no cost; 0 where none is known."""
        return len(text) // self._longest_characters if self._longest_characters else 0

    @cached_property
    def _longest_characters(self) -> int:
        """Of any token's text, or 0 where text may vanish: a normalizer, or a token that swallows blanks beside it."""
        added = self._backend.get_added_tokens_decoder().values()
        if self._backend.normalizer is not None or any(token.lstrip or token.rstrip for token in added):
            return 0
        return max(map(len, self._backend.get_vocab()), default=0)

    def _spell(self, token: int) -> bytes:
        piece = self._backend.id_to_token(token) if 0 <= token < 2**32 else None
        if piece is None:
            return b""
        return _byte_level_bytes(piece) if self.is_byte_level else _sentencepiece_bytes(piece)


def _byte_level_bytes(piece: str) -> bytes:
    """As tokenizers' ByteLevel decoder: a piece with any character outside the alphabet stands for itself."""
    try:
        return bytes(BYTE_ALPHABET[character] for character in piece)
    except KeyError:
        return piece.encode()


def _sentencepiece_bytes(piece: str) -> bytes:
    if byte := BYTE_PIECE.fullmatch(piece):
        return bytes.fromhex(byte[1])
    return piece.replace(SPACE_MARK, " ").encode()
