"""Prompts to token ids, refusing at once what is far too long to be worth encoding."""

from __future__ import annotations

from collections.abc import Sequence

from engine.api.errors import InvalidRequest
from engine.server.service import Service


async def encode_prompts(service: Service, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
    """Raises InvalidRequest for a text that cannot fit the model, however it would be cut into tokens, or that the
    tokenizer has a token for and the model has not."""
    for text in texts:
        _check_length(service, text)
    prompts = await service.tokenizer.encode_async(texts, add_special_tokens)
    return [check_token_ids(service, prompt) for prompt in prompts]


def _check_length(service: Service, text: str) -> None:
    least, most = service.tokenizer.vocabulary.least_tokens(text), service.client.model.max_model_len
    if least > most:
        raise InvalidRequest(
            f"The prompt has at least {least} tokens, and this model holds {most}, prompt and answer together",
            param="prompt",
            code="context_length_exceeded",
        )


def check_token_ids(service: Service, ids: list[int]) -> list[int]:
    """Raises InvalidRequest for an id that the model does not have."""
    size = service.client.model.vocab_size
    if ids and max(ids) >= size:
        raise InvalidRequest(f"prompt: token {max(ids)} is outside the vocabulary of {size}", param="prompt")
    return ids
