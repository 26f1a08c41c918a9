"""What a checkpoint says of its tokenizer: a Hugging Face directory, or the metadata of a GGUF file.

Read with the tokenizers library alone: importing transformers takes longer than everything else that the API process
does before it listens. Only a GGUF vocabulary of a rarer kind is left to transformers.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tokenizers import AddedToken, Tokenizer, processors

from engine.models.gguf_header import read_header
from engine.text.gguf_vocabulary import vocabulary_of

# What a chat template may name.
NAMED_TOKENS: Final = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
GGUF_IDS: Final = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
FLAGS: Final = ("single_word", "lstrip", "rstrip", "normalized", "special")  # of an added token


@dataclass(frozen=True, slots=True)
class TokenizerSource:
    backend: Tokenizer
    named_tokens: dict[str, str]  # `bos_token` and so on → its text
    chat_template: str | None


def read_source(path: Path) -> TokenizerSource:
    """Of a GGUF file, or of a directory. Raises ValueError when what is there cannot be used."""
    return from_gguf(path) if path.is_file() else from_directory(path)


def from_directory(path: Path) -> TokenizerSource:
    """Reads tokenizer.json, tokenizer_config.json and the chat template beside them. What encoding puts around a text
    is tokenizer.json's to say, whatever flags the configuration has."""
    if not (path / "tokenizer.json").is_file():
        raise ValueError(f"{path} has no tokenizer.json: save the tokenizer there with transformers' save_pretrained")
    try:
        backend, config = _backend(path / "tokenizer.json"), _config(path)
        named = {name: _text(config[name]) for name in NAMED_TOKENS if config.get(name)}
        _add_tokens(backend, _described(config), named.values())
        return TokenizerSource(backend, named, _chat_template(path, config))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"The tokenizer in {path} cannot be read: {error}") from error


def from_gguf(path: Path) -> TokenizerSource:
    metadata = read_header(path).metadata
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not tokens:
        raise ValueError(f"{path} holds no vocabulary (tokenizer.ggml.tokens)")
    backend = vocabulary_of(metadata)
    ids = {name: metadata.get(f"tokenizer.ggml.{key}") for name, key in GGUF_IDS.items()}
    named = {name: tokens[index] for name, index in ids.items() if index is not None}
    _add_tokens(backend, (), named.values())
    # Files without the flag: llama.cpp adds BOS to a sentencepiece vocabulary that does not say otherwise.
    add_bos = metadata.get("tokenizer.ggml.add_bos_token", metadata.get("tokenizer.ggml.model") == "llama")
    _frame(backend, named, bool(add_bos), bool(metadata.get("tokenizer.ggml.add_eos_token", False)))
    return TokenizerSource(backend, named, metadata.get("tokenizer.chat_template"))


def _backend(file: Path) -> Tokenizer:
    try:
        backend = Tokenizer.from_file(str(file))
    except Exception as error:
        if type(error) is not Exception:  # tokenizers says everything with the bare class
            raise
        raise ValueError(str(error)) from error
    backend.no_truncation()
    backend.no_padding()
    return backend


def _config(path: Path) -> dict[str, Any]:
    """Older directories keep the special tokens in a file of their own."""
    config = _json(path / "tokenizer_config.json")
    return config if "added_tokens_decoder" in config else config | _json(path / "special_tokens_map.json")


def _json(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return content


def _text(token: str | Mapping[str, Any]) -> str:
    return token if isinstance(token, str) else str(token["content"])


def _described(config: Mapping[str, Any]) -> list[AddedToken]:
    """The added tokens that the configuration describes, by id, then those that it only names."""
    by_id = sorted(config.get("added_tokens_decoder", {}).items(), key=lambda item: int(item[0]))
    described = [_added(token) for _, token in by_id]
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    known = {token.content for token in described}
    texts = [_text(token) for token in (extra.values() if isinstance(extra, dict) else extra)]
    return described + [AddedToken(text, special=True, normalized=False) for text in texts if text not in known]


def _added(token: Mapping[str, Any]) -> AddedToken:
    return AddedToken(token["content"], **{flag: token[flag] for flag in FLAGS if flag in token})


def _add_tokens(backend: Tokenizer, described: Iterable[AddedToken], named: Iterable[str]) -> None:
    """Makes sure that these are whole tokens, and that the named ones count as special."""
    known = {repr(token) for token in backend.get_added_tokens_decoder().values()}
    backend.add_tokens([token for token in described if repr(token) not in known])
    added = {token.content for token in backend.get_added_tokens_decoder().values()}
    backend.add_tokens([AddedToken(text, special=True, normalized=False) for text in named if text not in added])


def _frame(backend: Tokenizer, named: Mapping[str, str], add_bos: bool, add_eos: bool) -> None:
    """What encoding puts around a text."""
    before = [named["bos_token"]] if add_bos and "bos_token" in named else []
    after = [named["eos_token"]] if add_eos and "eos_token" in named else []
    special = [(text, backend.token_to_id(text)) for text in (*before, *after)]
    single = [*before, "$A", *after]
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)


def _chat_template(path: Path, config: Mapping[str, Any]) -> str | None:
    file, template = path / "chat_template.jinja", config.get("chat_template")
    if file.is_file():
        return file.read_text(encoding="utf-8")
    if isinstance(template, list):
        template = next((entry["template"] for entry in template if entry["name"] == "default"), None)
    return template
