"""The benches' own arithmetic: what they count, they count once, and the same for every server."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from aiohttp import web

from deploy.ports import free_ports
from tests.bench.load import Answer, Target, text_of
from tests.bench.plot import Panel, bars, lines
from tests.bench.servers import wanted
from tests.bench.traffic import Load, offer, timetable
from tests.bench.work import step_s

BUSY = Load(chats=2, chat_every_s=0.2, chat_tokens=3, short_per_s=20.0, long_per_s=10.0, seconds=0.5)


def test_the_timetable_is_the_same_for_every_server_and_the_chats_are_the_same_at_every_rate() -> None:
    assert timetable(BUSY, seed="1") == timetable(BUSY, seed="1") != timetable(BUSY, seed="2")
    chats = [arrival.at_s for arrival in timetable(BUSY, seed="1") if arrival.kind == "chat"]
    assert chats == [arrival.at_s for arrival in timetable(BUSY.chats_alone, seed="1")]


def test_no_prompt_is_known_to_a_prefix_cache() -> None:
    """Neither from another seed, nor from another rate, nor as the beginning of a longer one."""
    loads = (BUSY, BUSY.chats_alone, replace(BUSY, long_per_s=20.0))
    prompts = [arrival.prompt for load in loads for seed in ("1", "2") for arrival in timetable(load, seed)]
    prompts += [text_of(words, "1") for words in (20, 512, 2048)]
    beginnings = {tuple(prompt.split()[:8]) for prompt in prompts}
    assert len(beginnings) == len(prompts) > 100


@pytest.fixture
async def flaky() -> AsyncIterator[Target]:
    """Answers short prompts with all their tokens, ends a long one's answer too early, and is silent to some chats."""

    async def complete(request: web.Request) -> web.StreamResponse:
        asked = await request.json()
        tokens = 1 if len(asked["prompt"]) > 1000 else asked["max_tokens"]
        if asked["max_tokens"] == BUSY.chat_tokens:
            await asyncio.sleep(30.0)
        response = web.StreamResponse()
        await response.prepare(request)
        for _ in range(tokens):
            await response.write(b'data: {"choices": [{"text": "word"}]}\n\n')
        await response.write(b"data: [DONE]\n\n")
        return response

    app = web.Application()
    app.add_routes([web.post("/v1/completions", complete)])
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    (port,) = free_ports(1)
    await web.TCPSite(runner, "127.0.0.1", port).start()
    yield Target("flaky", (f"http://127.0.0.1:{port}",), "any")
    await runner.cleanup()


async def test_every_arrival_is_answered_failed_or_missed_and_counted_once(flaky: Target) -> None:
    arrivals = timetable(BUSY, seed="3")
    seen = await offer(flaky, BUSY, seed="3", patience_s=1.0)

    def came(kind: str) -> int:
        return sum(arrival.kind == kind for arrival in arrivals)

    assert seen.offered == len(arrivals)
    assert len(seen.of("short")) == came("short") > 0
    assert seen.of("long") == seen.of("chat") == []
    assert seen.missed == came("chat") - BUSY.chats  # each chat waited for its first answer until time was up
    assert seen.failed == came("long") + BUSY.chats


def answer(chunks: list[float], num_tokens: int) -> Answer:
    return Answer(started=0.0, chunks=chunks, num_tokens=num_tokens)


def test_a_step_is_timed_only_while_every_stream_runs() -> None:
    early = answer([0.1 * number for number in range(41)], 41)  # alone until 2.0, at 0.1 s
    late = answer([2.0 + 0.2 * number for number in range(31)], 31)
    both = answer([2.0 + 0.1 * number for number in range(21)], 21)
    assert step_s([early]) == pytest.approx(0.1)
    assert step_s([both, answer(both.chunks, 21)]) == pytest.approx(0.1)
    with pytest.raises(RuntimeError, match="hardly ran together"):
        step_s([early, late])


def test_tokens_sent_together_count_as_many() -> None:
    assert step_s([answer([0.2 * number for number in range(21)], 42)]) == pytest.approx(0.1)


def test_servers_are_named_with_flags_or_by_url() -> None:
    assert wanted("pair").recipe == "pair"
    named = wanted("q4=hybrid --quantization auto --chat-template=x")
    assert (named.name, named.recipe, named.flags) == ("q4", "hybrid", ("--quantization", "auto", "--chat-template=x"))
    assert wanted("hybrid --dtype=float32").flags == ("--dtype=float32",)
    assert wanted("other=http://127.0.0.1:1#m").url == "http://127.0.0.1:1#m"
    with pytest.raises(argparse.ArgumentTypeError, match="none of hybrid"):
        wanted("hybird")


def test_charts_are_well_formed_and_say_what_was_not_measured(tmp_path: Path) -> None:
    bars(tmp_path / "bars.svg", [Panel("1 stream", "ms", {"<ours>": 1.5, "peer": None})])
    lines(tmp_path / "lines.svg", "Goodput", "offered", "good", {"ours": [(1.0, 1.0), (2.0, 1.5)]})
    drawn = [ElementTree.parse(tmp_path / name).getroot() for name in ("bars.svg", "lines.svg")]
    texts = {element.text for element in drawn[0].iter("{http://www.w3.org/2000/svg}text")}
    assert {"<ours>", "1.5", "–"} <= texts
    assert len(list(drawn[1].iter("{http://www.w3.org/2000/svg}circle"))) == 2
