"""Mixed traffic, the same for every server: chats turn after turn, short questions, and long prompts, on a timetable.

Arrivals are open-loop: they come when the timetable says, whatever became of those before. Only a chat's next turn
waits for the answer to its last, as its user must; turns that never began are counted as missed.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import aiohttp

from tests.bench.load import Answer, Target, open_session, stream, text_of

Kind = Literal["chat", "short", "long"]
SHORT_WORDS = 24  # of a chat's turn too
LONG_WORDS = 1000
SHORT_TOKENS = 32
LONG_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Load:
    """How much comes. Rates are the means of exponential distributions."""

    chats: int
    chat_every_s: float  # between the beginnings of two turns of a chat
    chat_tokens: int
    short_per_s: float
    long_per_s: float
    seconds: float

    @property
    def chats_alone(self) -> Load:
        return Load(self.chats, self.chat_every_s, self.chat_tokens, 0.0, 0.0, self.seconds)


@dataclass(frozen=True, slots=True)
class Arrival:
    kind: Kind
    at_s: float  # after the beginning of the round
    prompt: str
    num_tokens: int
    chat: int | None = None  # which chat it is a turn of


@dataclass
class Seen:
    """What became of one round's arrivals: each is answered, failed or missed, and counted once."""

    seconds: float
    answers: list[tuple[Arrival, Answer]] = field(default_factory=list)
    missed: int = 0  # turns that never began

    @property
    def offered(self) -> int:
        return len(self.answers) + self.missed

    @property
    def failed(self) -> int:
        return sum(not answer.ok for _, answer in self.answers)

    def of(self, *kinds: Kind) -> list[Answer]:
        """The good ones and the slow, not the failed."""
        return [answer for arrival, answer in self.answers if arrival.kind in kinds and answer.ok]


def timetable(load: Load, seed: str) -> list[Arrival]:
    """The same for the same `seed`. The chats come at the same times whatever else does; no prompt of another load, or
    of another seed, comes again."""
    arrivals = [turn for chat in range(load.chats) for turn in _turns(load, chat, seed)]
    others: list[tuple[Kind, float, int, int]] = [
        ("short", load.short_per_s, SHORT_WORDS, SHORT_TOKENS),
        ("long", load.long_per_s, LONG_WORDS, LONG_TOKENS),
    ]
    for kind, rate, words, tokens in others:
        for number, at_s in enumerate(_poisson(random.Random(f"{kind} {seed}"), rate, load.seconds)):
            arrivals.append(Arrival(kind, at_s, _prompt(words, kind, load, seed, number), tokens))
    return sorted(arrivals, key=lambda arrival: arrival.at_s)


def _turns(load: Load, chat: int, seed: str) -> Iterator[Arrival]:
    begin_s = chat * load.chat_every_s / load.chats  # spread evenly: chats do not speak in chorus
    for number in itertools.count():
        at_s = begin_s + number * load.chat_every_s
        if at_s >= load.seconds:
            return
        yield Arrival("chat", at_s, _prompt(SHORT_WORDS, f"chat {chat}", load, seed, number), load.chat_tokens, chat)


def _poisson(chance: random.Random, rate: float, seconds: float) -> Iterator[float]:
    at_s = 0.0
    while rate > 0:
        at_s += chance.expovariate(rate)
        if at_s >= seconds:
            return
        yield at_s


def _prompt(words: int, name: str, load: Load, seed: str, number: int) -> str:
    return text_of(words, f"{name} {load} {seed} {number}")


async def offer(target: Target, load: Load, seed: str, patience_s: float) -> Seen:
    """One round. Ends when all that began in time is answered or has failed; `patience_s` is each request's longest."""
    seen, arrivals = Seen(load.seconds), timetable(load, seed)
    began = time.perf_counter()
    async with open_session(patience_s) as session, asyncio.TaskGroup() as group:
        for chat in range(load.chats):
            turns = [arrival for arrival in arrivals if arrival.chat == chat]
            group.create_task(_converse(session, target, turns, began, seen))
        for arrival in arrivals:
            if arrival.chat is None:
                group.create_task(_ask(session, target, arrival, began, seen))
    return seen


async def _converse(
    session: aiohttp.ClientSession, target: Target, turns: list[Arrival], began: float, seen: Seen
) -> None:
    for turn in turns:
        if time.perf_counter() - began >= seen.seconds:
            seen.missed += 1
        else:
            await _ask(session, target, turn, began, seen)


async def _ask(session: aiohttp.ClientSession, target: Target, arrival: Arrival, began: float, seen: Seen) -> None:
    await asyncio.sleep(max(0.0, began + arrival.at_s - time.perf_counter()))
    seen.answers.append((arrival, await stream(session, target, arrival.prompt, arrival.num_tokens)))
