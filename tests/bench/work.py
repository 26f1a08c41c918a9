"""The pieces of work that servers are timed on: steps of streams and chats, and prompts to their first token.

Streams are answers to random words, which a small model soon repeats; chats are answers to questions.
"""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Callable, Coroutine
from dataclasses import dataclass

from tests.bench.floor import Case
from tests.bench.load import Answer, Target, ask, open_session, stream, streams, text_of
from tests.bench.questions import question_of

STREAM_PROMPT = 16  # words
STREAM_TOKENS = 96
CHAT_PROMPT = 40  # tokens, about: the template's and the question's
CHAT_TOKENS = 256
CHAT_REPEATS = 2  # of one chat alone: answers repeat themselves more and less
STEADY_TOKENS = 16  # of each stream, that must fall into the time when all of them run
WARM_TOKENS = 4
TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True)
class Work:
    """One kind of measurement. `measure` raises RuntimeError when the server fails at it."""

    name: str
    unit: str
    repeats: int  # a round; their median counts
    case: Case  # what its floor is worked out from
    measure: Callable[[Target, str], Coroutine[None, None, float]]  # of a seed

    def figure(self, target: Target, seed: str) -> float:
        """Of one round, in `unit`. Raises RuntimeError."""
        # What ran before has left caches cold and processes asleep: a first short answer is not counted.
        asyncio.run(_warm(target, f"{self.name} {seed}"))
        return statistics.median(asyncio.run(self.measure(target, f"{seed} {count}")) for count in range(self.repeats))

    @property
    def scale(self) -> float:
        """The unit's share of a second."""
        return 1e3 if self.unit.startswith("ms") else 1.0


def decoding(num_streams: int) -> Work:
    async def measure(target: Target, seed: str) -> float:
        prompts = [text_of(STREAM_PROMPT, f"{num_streams} {seed} {index}") for index in range(num_streams)]
        async with open_session(TIMEOUT_S) as session:
            return 1e3 * step_s(succeeded(await streams(session, target, prompts, STREAM_TOKENS)))

    name = f"{num_streams} stream{'s' if num_streams > 1 else ''}"
    case = Case(name, num_streams, 1, STREAM_PROMPT + STREAM_TOKENS // 2)
    return Work(name, "ms per token", 1, case, measure)


def chatting(num_chats: int) -> Work:
    async def measure(target: Target, seed: str) -> float:
        questions = [question_of(f"{num_chats} {seed} {index}") for index in range(num_chats)]
        async with open_session(TIMEOUT_S) as session:
            asked = [ask(session, target, question, CHAT_TOKENS) for question in questions]
            return 1e3 * step_s(succeeded(await asyncio.gather(*asked)))

    name = f"{num_chats} chat{'s' if num_chats > 1 else ''}"
    case = Case(name, num_chats, 1, CHAT_PROMPT + CHAT_TOKENS // 2)
    return Work(name, "ms per token", CHAT_REPEATS if num_chats == 1 else 1, case, measure)


def step_s(answers: list[Answer]) -> float:
    """Seconds per token of a stream while every stream runs: from the last first token to the first last token."""
    since, until = max(one.chunks[0] for one in answers), min(one.chunks[-1] for one in answers)
    # A chunk may hold several tokens, here as many as on average: servers that send them together are not favoured.
    tokens = sum(
        sum(since < chunk <= until for chunk in one.chunks) * one.num_tokens / len(one.chunks) for one in answers
    )
    if tokens < STEADY_TOKENS * len(answers):
        raise RuntimeError(f"the {len(answers)} streams hardly ran together: {max(0, until - since):.2f} s")
    return (until - since) * len(answers) / tokens


def reading(num_words: int, repeats: int) -> Work:
    async def measure(target: Target, seed: str) -> float:
        async with open_session(TIMEOUT_S) as session:
            (answer,) = succeeded([await stream(session, target, text_of(num_words, seed), 2)])
        if answer.prompt_tokens and abs(answer.prompt_tokens - num_words) > 1:
            raise RuntimeError(f"{num_words} words were {answer.prompt_tokens} tokens")
        return answer.ttft

    name = f"{num_words:,}-token prompt"
    return Work(name, "s to first token", repeats, Case(name, 1, num_words, 0), measure)


def succeeded(answers: list[Answer]) -> list[Answer]:
    failed = [answer.error for answer in answers if answer.error]
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(answers)} requests failed: {failed[0]}")
    return answers


async def _warm(target: Target, seed: str) -> None:
    async with open_session(TIMEOUT_S) as session:
        succeeded([await stream(session, target, text_of(STREAM_PROMPT, f"warm {seed}"), 4)])


WORK = [
    *(decoding(1), decoding(8), decoding(32)),
    *(chatting(1), chatting(8)),
    *(reading(20, 5), reading(512, 3), reading(2048, 1)),
]
