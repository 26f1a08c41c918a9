"""A client that measures: streams completions from any OpenAI server and keeps the time of every chunk."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import aiohttp

TEXT = (
    "river stone market lantern window garden copper violin harvest winter signal bridge paper forest engine harbor "
    "silver morning ladder candle thunder meadow pocket island mirror desert blanket teacher orange compass"
)
WORDS = TEXT.split()
TIMEOUT_S = 600.0


@dataclass(slots=True)
class Target:
    """One server under test: a name for the table, its base URLs up to /v1, the model it serves.

    Several URLs: equal servers, to which requests are dealt out in turn.
    """

    name: str
    urls: tuple[str, ...]
    model: str
    turns: Iterator[str] = field(init=False)

    def __post_init__(self) -> None:
        self.turns = itertools.cycle(self.urls)


@dataclass(slots=True)
class Answer:
    """One streamed answer. Times are seconds of time.perf_counter."""

    started: float
    chunks: list[float] = field(default_factory=list)  # arrivals of chunks that carry text
    num_tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0  # of the prompt, where the server tells
    error: str | None = None

    @property
    def ok(self) -> bool:
        return self.error is None

    @property
    def ttft(self) -> float:
        return self.chunks[0] - self.started

    @property
    def gaps(self) -> list[float]:
        return [later - earlier for earlier, later in zip(self.chunks, self.chunks[1:], strict=False)]

    @property
    def seconds_per_token(self) -> float:
        """After the first token; servers that send several tokens a chunk are not favoured by it."""
        return (self.chunks[-1] - self.chunks[0]) / max(self.num_tokens - 1, 1)


def text_of(num_words: int, seed: str) -> str:
    """Words in an order that no prefix cache has seen; each is one token for SmolLM2.

    Another seed or another length is another beginning: no prompt is the start of a longer one.
    """
    chance = random.Random(f"{num_words} {seed}")
    return " ".join(chance.choice(WORDS) for _ in range(num_words))


async def stream(session: aiohttp.ClientSession, target: Target, prompt: str, max_tokens: int) -> Answer:
    """Asks for exactly `max_tokens` greedy tokens where the server can ignore EOS. An error becomes the answer's."""
    answer = await _stream(session, target, "completions", {"prompt": prompt, "temperature": 0.0}, max_tokens)
    if answer.ok and answer.cached_tokens:
        answer.error = f"{answer.cached_tokens} tokens of a prompt that should be new were cached"
    return answer


async def ask(session: aiohttp.ClientSession, target: Target, question: str, max_tokens: int) -> Answer:
    """The same as a chat, of sampled tokens, as people ask: all chats begin alike, so that a part may be cached."""
    wishes = {"messages": [{"role": "user", "content": question}], "temperature": 0.7, "top_p": 0.95}
    return await _stream(session, target, "chat/completions", wishes, max_tokens)


async def _stream(
    session: aiohttp.ClientSession, target: Target, route: str, wishes: dict[str, Any], max_tokens: int
) -> Answer:
    body = {
        **wishes,
        "model": target.model,
        "max_tokens": max_tokens,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    answer = Answer(time.perf_counter())
    try:
        async with session.post(f"{next(target.turns)}/v1/{route}", json=body) as response:
            if response.status != 200:
                answer.error = f"{response.status}: {(await response.text())[:200]}"
                return answer
            # Read now, parsed later: the client's work is on the servers' cores.
            lines = [(time.perf_counter(), line) async for line in response.content if line.startswith(b"data: {")]
        for arrived, line in lines:
            _read(answer, arrived, line)
    except (aiohttp.ClientError, TimeoutError) as error:
        answer.error = repr(error)
    answer.error = answer.error or _lacks(answer, max_tokens)
    return answer


def _read(answer: Answer, arrived: float, line: bytes) -> None:
    event = json.loads(line[6:])
    if "error" in event:
        answer.error = str(event["error"])
        return
    choice = event["choices"][0] if event.get("choices") else {}
    if choice.get("text") or choice.get("delta", {}).get("content"):
        answer.chunks.append(arrived)
    usage = event.get("usage")
    answer.num_tokens = usage["completion_tokens"] if usage else max(answer.num_tokens, len(answer.chunks))
    if usage:
        answer.prompt_tokens = usage["prompt_tokens"]
        answer.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0


def _lacks(answer: Answer, max_tokens: int) -> str | None:
    """An answer that ended early would be quick for the wrong reason."""
    if not answer.chunks:
        return "an empty answer"
    return None if answer.num_tokens >= max_tokens else f"{answer.num_tokens} tokens in place of {max_tokens}"


def open_session(timeout_s: float = TIMEOUT_S) -> aiohttp.ClientSession:
    """A connection for each request: one kept to a server that was stopped meanwhile may be closed at its far end."""
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    return aiohttp.ClientSession(
        connector=connector, timeout=aiohttp.ClientTimeout(total=timeout_s), read_bufsize=1 << 20
    )


async def streams(session: aiohttp.ClientSession, target: Target, prompts: list[str], max_tokens: int) -> list[Answer]:
    """All at once."""
    return list(await asyncio.gather(*(stream(session, target, prompt, max_tokens) for prompt in prompts)))
