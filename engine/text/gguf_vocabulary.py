"""The vocabulary in a GGUF file's metadata, as a tokenizer: byte-level BPE is put together here, other kinds and rarer
ways to split a text are left to transformers, whose import takes seconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from engine.text.vocabulary import BYTE_ALPHABET

CONTROL, USER_DEFINED = 3, 4  # kinds of token that ggml marks

# How the text was cut before its merges were learned, by the file's `tokenizer.ggml.pre`.
GPT2: Final = frozenset({None, "gpt-2"})
DIGIT_SPLITTERS: Final = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"})
DIGITS_IN_A_RUN: Final = {"llama-bpe": 3, "llama3": 3, "llama-v3": 3, "qwen2": 1, "deepseek-r1-qwen": 1}


def vocabulary_of(metadata: Mapping[str, Any]) -> Tokenizer:
    """Raises ValueError for a kind that nobody can build."""
    kind, split = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    known = split in GPT2 or split in DIGIT_SPLITTERS or split in DIGITS_IN_A_RUN
    if kind == "gpt2" and known and "tokenizer.ggml.merges" in metadata:
        return _byte_level(metadata, split)
    return _by_transformers(metadata)


def _byte_level(metadata: Mapping[str, Any], split: str | None) -> Tokenizer:
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    alphabet = frozenset(BYTE_ALPHABET)
    spelled = [token if alphabet.issuperset(token) else _respell(token) for token in tokens]
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    backend = Tokenizer(models.BPE({token: index for index, token in enumerate(spelled)}, merges))
    backend.pre_tokenizer = _splitter(split)
    backend.decoder = decoders.ByteLevel()
    kinds = metadata.get("tokenizer.ggml.token_type") or ()
    # Of the control tokens only those in the byte alphabet: others are mislabelled, and would be new tokens.
    control = [token for token, written in _of_kind(CONTROL, kinds, tokens, spelled) if token == written]
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    whole = [token for token, written in _of_kind(USER_DEFINED, kinds, tokens, spelled) if token == written]
    backend.add_tokens([AddedToken(token, normalized=False, special=False) for token in whole])
    return backend


def _of_kind(kind: int, kinds: Sequence[int], tokens: list[str], spelled: list[str]) -> list[tuple[str, str]]:
    """Each token as the file has it, and in the byte alphabet."""
    return [pair for found, *pair in zip(kinds, tokens, spelled, strict=False) if found == kind]  # type: ignore[misc]


def _respell(token: str) -> str:
    """In GPT-2's alphabet, where a character stands for a byte."""
    letters = {byte: letter for letter, byte in BYTE_ALPHABET.items()}
    return "".join(letters[byte] for byte in token.encode())


def _splitter(split: str | None) -> pre_tokenizers.PreTokenizer:
    if split in DIGIT_SPLITTERS:
        return pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    if split in DIGITS_IN_A_RUN:
        words = pre_tokenizers.Split(Regex(_words(DIGITS_IN_A_RUN[split])), behavior="isolated")
        return pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def _words(digits: int) -> str:
    """Llama 3's and Qwen 2's pattern: they differ in how many digits stay together."""
    kinds = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",  # English contractions
        r"[^\r\n\p{L}\p{N}]?\p{L}+",  # a word, with the blank or mark before it
        r"\p{N}" if digits == 1 else rf"\p{{N}}{{1,{digits}}}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",  # punctuation, with the line's end behind it
        r"\s*[\r\n]+",
        r"\s+(?!\S)",  # blanks, but for the one that belongs to the next word
        r"\s+",
    )
    return "|".join(kinds)


def _by_transformers(metadata: Mapping[str, Any]) -> Tokenizer:
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_TOKENIZER_MAPPING, convert_gguf_tokenizer

    described = {
        name: metadata[f"tokenizer.{key}"]
        for key, name in GGUF_TOKENIZER_MAPPING["tokenizer"].items()
        if f"tokenizer.{key}" in metadata
    }
    backend, _ = convert_gguf_tokenizer(metadata["general.architecture"], described)
    converted: Tokenizer = backend
    return converted
