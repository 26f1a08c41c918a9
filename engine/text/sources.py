"""Where tokenizers come from: a Hugging Face directory, or the metadata of a GGUF file. Both through transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import tokenizers
from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_TOKENIZER_MAPPING, convert_gguf_tokenizer

from engine.models.gguf_file import read_gguf

# Vocabularies whose merges were learned with every digit split off; transformers treats them as plain GPT-2.
DIGIT_SPLITTERS: Final = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"})
SPECIAL_TOKENS: Final = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}


def from_directory(path: Path) -> PreTrainedTokenizerFast:
    """Reads tokenizer.json, tokenizer_config.json and the chat template beside them. Raises ValueError.

    Not through AutoTokenizer: that imports torch, only to learn what tokenizer.json says already.
    """
    if not (path / "tokenizer.json").is_file():
        raise ValueError(f"{path} has no tokenizer.json: save the tokenizer there with transformers' save_pretrained")
    try:
        fast: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"The tokenizer in {path} cannot be read: {error}") from error
    return fast


def from_gguf(path: Path) -> PreTrainedTokenizerFast:
    """Raises ValueError for a vocabulary of a kind that transformers cannot build."""
    metadata = read_gguf(path).metadata
    described = {
        name: metadata[f"tokenizer.{key}"]
        for key, name in GGUF_TOKENIZER_MAPPING["tokenizer"].items()
        if f"tokenizer.{key}" in metadata
    }
    if "tokens" not in described:
        raise ValueError(f"{path} holds no vocabulary (tokenizer.ggml.tokens)")
    backend, _ = convert_gguf_tokenizer(metadata["general.architecture"], described)
    _mend_digits(backend, described.get("pre_tokenizer_type"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **_specials(metadata, described["tokens"]))


def _mend_digits(backend: tokenizers.Tokenizer, pre_tokenizer: str | None) -> None:
    if pre_tokenizer in DIGIT_SPLITTERS:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )


def _specials(metadata: dict[str, Any], tokens: list[str]) -> dict[str, Any]:
    """Keyword arguments for transformers: the special tokens' texts, the flags, the chat template."""
    ids = {name: metadata.get(f"tokenizer.ggml.{key}") for name, key in SPECIAL_TOKENS.items()}
    # Files without the flag: llama.cpp adds BOS to a sentencepiece vocabulary that does not say otherwise.
    add_bos = metadata.get("tokenizer.ggml.add_bos_token", metadata.get("tokenizer.ggml.model") == "llama")
    return {
        **{name: tokens[index] if index is not None else None for name, index in ids.items()},
        "add_bos_token": bool(add_bos),
        "add_eos_token": bool(metadata.get("tokenizer.ggml.add_eos_token", False)),
        "chat_template": metadata.get("tokenizer.chat_template"),
    }
