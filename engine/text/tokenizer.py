"""Text to token ids and back, from a Hugging Face directory or a GGUF file, without importing torch or transformers."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Self

from engine.models.resolve import resolve
from engine.text.detokenizer import ByteDetokenizer, Detokenizer, WindowDetokenizer
from engine.text.sources import TokenizerSource, read_source
from engine.text.template import ChatTemplate
from engine.text.vocabulary import Vocabulary

LONG_TEXT_CHARACTERS: Final = 16_384  # about 5 ms of encoding: longer texts go to a thread

# One text is never worth a pool of threads, and the engine's cores have other work.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


class Tokenizer:
    """Thread-safe after construction. `template` is None for a model that has no chat template."""

    def __init__(self, source: TokenizerSource, template: ChatTemplate | None) -> None:
        self._backend = source.backend
        self.vocabulary = Vocabulary(self._backend)
        self.template = template

    @classmethod
    def load(cls, path_or_name: str | Path, chat_template: str | None = None) -> Self:
        """`chat_template` is a Jinja file or the template itself, in place of the model's own.

        Raises ModelNotFound, or ValueError when what is there holds no usable tokenizer or template.
        """
        source = read_source(resolve(str(path_or_name)))
        return cls(source, ChatTemplate.choose(chat_template, source.chat_template, source.named_tokens))

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """`add_special_tokens` for plain prompts (BOS where the model wants it), not for rendered chats."""
        return self._encode([text], add_special_tokens)[0]

    async def encode_async(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        """`encode` of each, in a thread when together they are long enough to hold up the event loop."""
        if sum(map(len, texts)) < LONG_TEXT_CHARACTERS:
            return self._encode(texts, add_special_tokens)
        return await asyncio.to_thread(self._encode, texts, add_special_tokens)

    def _encode(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        # The batch call, other than the single one, lets other Python threads run meanwhile.
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        text: str = self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def detokenizer(self, skip_special_tokens: bool) -> Detokenizer:
        """A fresh incremental decoder for one answer."""
        if not self.vocabulary.is_byte_level:
            return WindowDetokenizer(lambda ids: self.decode(ids, skip_special_tokens))
        visible = self.vocabulary.visible_bytes if skip_special_tokens else self.vocabulary.token_bytes
        return ByteDetokenizer(visible)
