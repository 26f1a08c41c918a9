"""What the API process keeps of what the core says, until its reader takes it."""

from __future__ import annotations

import asyncio

import pytest

from engine.client import Mailbox
from engine.core import Delta, FinishReason


async def test_unread_deltas_are_read_as_one() -> None:
    mailbox = Mailbox()
    mailbox.put(Delta(request_id="a", tokens=[1], cached_tokens=4))
    mailbox.put(Delta(request_id="a", tokens=[2], cached_tokens=4, finish_reason=FinishReason.STOP))
    assert await mailbox.get() == Delta(request_id="a", tokens=[1, 2], cached_tokens=4, finish_reason=FinishReason.STOP)


async def test_an_error_is_the_last_word_even_when_tokens_follow() -> None:
    """At the end of a drain the core still speaks."""
    mailbox = Mailbox()
    mailbox.put(Delta(request_id="a", finish_reason=FinishReason.ERROR, error="shut down", error_status=503))
    mailbox.put(Delta(request_id="a", tokens=[1]))
    last = await mailbox.get()
    assert (last.finish_reason, last.error, last.error_status) == (FinishReason.ERROR, "shut down", 503)


async def test_an_answer_that_has_ended_stays_whole_when_the_core_dies() -> None:
    mailbox = Mailbox()
    mailbox.put(Delta(request_id="a", tokens=[1], finish_reason=FinishReason.LENGTH))
    mailbox.put(Delta(request_id="a", finish_reason=FinishReason.ERROR, error="died", error_status=503))
    assert (await mailbox.get()).finish_reason is FinishReason.LENGTH


async def test_a_reader_whose_time_is_up_waits_no_more() -> None:
    mailbox = Mailbox()
    reading = asyncio.create_task(mailbox.get())
    await asyncio.sleep(0)
    mailbox.expire()
    mailbox.put(Delta(request_id="a", tokens=[1]))
    with pytest.raises(TimeoutError):
        await reading
    with pytest.raises(TimeoutError):
        await mailbox.get()


async def test_an_answer_that_ended_in_time_is_read_after_it() -> None:
    mailbox = Mailbox()
    mailbox.put(Delta(request_id="a", tokens=[1], finish_reason=FinishReason.LENGTH))
    mailbox.expire()
    assert (await mailbox.get()).finish_reason is FinishReason.LENGTH
    with pytest.raises(TimeoutError):
        await mailbox.get()


async def test_a_reader_that_gives_up_leaves_the_next_delta_readable() -> None:
    mailbox = Mailbox()
    reading = asyncio.create_task(mailbox.get())
    await asyncio.sleep(0)
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)
    mailbox.put(Delta(request_id="a", tokens=[1]))
    assert (await mailbox.get()).tokens == [1]
