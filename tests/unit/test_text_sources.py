"""Tokenizers and chat templates read without transformers are those that transformers reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_TOKENIZER_MAPPING, convert_gguf_tokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from engine.models.gguf_header import read_header
from engine.models.resolve import resolve
from engine.text import gguf_vocabulary, sources
from engine.text.template import ChatTemplate, Message

TEXTS = (
    "Hello world, it's   me!\n\n  We're   12345 and 3.14159 €  ",
    "naïve ünïcödé 日本語 \U0001f9ff\tTabs\r\nand lines<|im_start|>user<|endoftext|><tool>x</tool> 'LL 'll",
    "def f(x):\n    return x ** 2  # done\n\n\n",
    " leading and trailing ",
    "",
)


@pytest.fixture(scope="module")
def metadata() -> dict[str, Any]:
    return read_header(resolve("smollm2")).metadata


def by_transformers(metadata: Mapping[str, Any]) -> Tokenizer:
    names = GGUF_TOKENIZER_MAPPING["tokenizer"]
    described = {name: metadata[f"tokenizer.{key}"] for key, name in names.items() if f"tokenizer.{key}" in metadata}
    return convert_gguf_tokenizer(metadata["general.architecture"], described)[0]


@pytest.mark.parametrize("split", ["gpt-2", "llama-bpe", "llama3", "llama-v3", "qwen2", "deepseek-r1-qwen"])
def test_a_byte_level_vocabulary_is_the_one_transformers_builds(metadata: dict[str, Any], split: str) -> None:
    kinds = list(metadata["tokenizer.ggml.token_type"])
    kinds[-1] = gguf_vocabulary.USER_DEFINED
    changed = metadata | {"tokenizer.ggml.pre": split, "tokenizer.ggml.token_type": kinds}
    ours, theirs = gguf_vocabulary.vocabulary_of(changed), by_transformers(changed)
    for text in (*TEXTS, f"a{metadata['tokenizer.ggml.tokens'][-1]}b"):
        assert ours.encode(text).ids == theirs.encode(text).ids
    assert ours.get_vocab() == theirs.get_vocab()
    assert str(ours.get_added_tokens_decoder()) == str(theirs.get_added_tokens_decoder())


def test_tokens_that_are_not_spelled_in_bytes_are_respelled(metadata: dict[str, Any]) -> None:
    tokens, kinds = list(metadata["tokenizer.ggml.tokens"]), list(metadata["tokenizer.ggml.token_type"])
    tokens[-2:], kinds[-2:] = ["two words", "<ünmarked mark>"], [gguf_vocabulary.CONTROL, gguf_vocabulary.USER_DEFINED]
    changed = metadata | {
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": metadata["tokenizer.ggml.merges"][:1000],
    }
    ours, theirs = gguf_vocabulary.vocabulary_of(changed), by_transformers(changed)
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours.encode("two words <ünmarked mark>").ids == theirs.encode("two words <ünmarked mark>").ids


def test_a_rarer_kind_is_left_to_transformers() -> None:
    pieces = ["<unk>", "<s>", "</s>", "▁", "a", "b", "ab", "▁ab"]
    metadata = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.scores": [0.0, 0.0, 0.0, -3.0, -4.0, -5.0, -1.0, -2.0],
        "tokenizer.ggml.token_type": [2, 3, 3, 1, 1, 1, 1, 1],
    }
    assert gguf_vocabulary.vocabulary_of(metadata).encode("ab").tokens == ["▁ab"]


EOS = {"__type": "AddedToken", "content": "</s>", "lstrip": False, "normalized": False, "special": True}
CONFIGS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "names": {"bos_token": "<s>", "eos_token": EOS, "unk_token": "<unk>"},
    "flags that tokenizer.json overrules": {"bos_token": "<s>", "add_bos_token": True},
    "a token of its own": {
        "bos_token": "<new>",
        "added_tokens_decoder": {"5": {"content": "<tool>", "special": False, "normalized": False}},
    },
    "extra tokens": {"eos_token": "</s>", "extra_special_tokens": ["<tool>", "<s>"]},
    "one template": {"eos_token": "</s>", "chat_template": "{{ messages[0].content }}{{ eos_token }}"},
    "templates by name": {
        "chat_template": [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    },
}


def save(path: Path, config: Mapping[str, Any]) -> None:
    vocab = {"<s>": 0, "</s>": 1, "<unk>": 2, "a": 3, "b": 4, "ab": 5}
    backend = Tokenizer(models.BPE(vocab, [("a", "b")]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<s>", special=True)])
    backend.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_directory_reads_as_transformers_reads_it(config: dict[str, Any], tmp_path: Path) -> None:
    save(tmp_path, config)
    ours, theirs = sources.from_directory(tmp_path), PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for text in ("ab", "a<s>b</s><tool><new> ba"):
        for special in (True, False):
            expected = theirs.backend_tokenizer.encode(text, add_special_tokens=special)
            assert ours.backend.encode(text, add_special_tokens=special).ids == expected.ids
    assert ours.named_tokens == theirs.special_tokens_map
    template = theirs.chat_template
    assert ours.chat_template == (template["default"] if isinstance(template, dict) else template)


def test_the_template_file_and_the_old_map_of_tokens_are_read(tmp_path: Path) -> None:
    save(tmp_path, {"chat_template": "the configuration's"})
    (tmp_path / "chat_template.jinja").write_text("the file's")
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": "</s>"}))
    source = sources.from_directory(tmp_path)
    assert (source.chat_template, source.named_tokens) == ("the file's", {"eos_token": "</s>"})


@pytest.mark.parametrize("broken", ["tokenizer.json", "tokenizer_config.json"])
def test_a_broken_directory_is_refused(broken: str, tmp_path: Path) -> None:
    save(tmp_path, {})
    (tmp_path / broken).write_text('{"model": 3')
    with pytest.raises(ValueError, match=f"tokenizer in {tmp_path} cannot be read"):
        sources.from_directory(tmp_path)


TEMPLATES = (
    "{% for message in messages %}\n  {% if loop.last %}last {% endif %}\n{{ message.content | trim }}\n{% endfor %}",
    "{{ bos_token }}{% generation %}{{ messages[-1]['content'] }}{% endgeneration %} {{ tools }} {{ documents }}",
    "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}"
    "{{ {'r': m.role} | tojson(indent=2) }}{{ m.content }}{% endfor %}",
    "{% set ns = namespace(found=false, self=2) %}{% set ns.found = true %}{{ ns.found }} {{ messages[-1].content }}",
    "{{ dict(a=1)['a'] }} {{ {'b': '<ü>'} | tojson }} {{ messages[-1].content }} {{ strftime_now('%Y') | length }}",
    "{% for m in messages %}{{ m.thinking }}|{{ m.reasoning_content }}|{{ m.content }}{% endfor %}",
    "{% if add_generation_prompt %}assistant:{% endif %}{{ messages[-1].content }}<end>",
)
MESSAGES: list[Message] = [
    {"role": "system", "content": "Be <kind>."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "reasoning_content": "They greet.", "content": "Hello there "},
]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("continued", [False, True])
def test_a_template_renders_as_transformers_renders_it(template: str, continued: bool) -> None:
    expected, _ = render_jinja_template(
        [MESSAGES],
        chat_template=template,
        add_generation_prompt=not continued,
        continue_final_message=continued,
        bos_token="<s>",
    )
    found = ChatTemplate(template, {"bos_token": "<s>"}).render(
        MESSAGES, add_generation_prompt=not continued, continue_final_message=continued
    )
    assert found == expected[0]


ESCAPES = (
    "{{ messages.append(1) }}",
    "{{ messages[0].update(role='x') }}",
    "{{ dict.__class__.__mro__ }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{% set ns = namespace(_hidden=1) %}",
    "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ raise_exception.__globals__.json }}",
)


@pytest.mark.parametrize("template", ESCAPES)
def test_a_template_cannot_leave_its_sandbox(template: str) -> None:
    with pytest.raises(Exception, match="The chat template refuses these messages"):
        ChatTemplate(template, {}).render(MESSAGES)
