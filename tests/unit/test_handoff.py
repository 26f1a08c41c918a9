"""Every hand-off ends once, with the right tokens, and every block comes home: in the plain order, in odd ones, and in
random ones with deaths, aborts and frees thrown in."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.api.errors import Declined, error_of
from engine.core import FinishReason, TokenLogprobs
from kvtransfer import epochs
from kvtransfer.protocol import Done, Fail, Key
from tests.unit.toy_engines import DECODE, PREFILL, VOCABULARY, Pair, expected_answer, toy_request

PROMPT = list(range(1, 22))
ANNOUNCED = Done(
    Key(7, 0), epoch=1, epoch_slot=0, blocks=list(range(6)), num_computed=21, first_token=1, logprobs=b"", num_cached=0
)


def test_decode_continues_what_prefill_read() -> None:
    pair = Pair()
    pair.give(7, PROMPT)
    taken = pair.take(7, PROMPT, max_tokens=9)
    pair.settle()
    assert pair.decode.answers[taken].tokens == expected_answer(PROMPT, 9)
    assert pair.decode.engine.taking.counters.tokens == len(PROMPT)
    assert pair.decode.engine.taking.counters.recomputed_tokens == 0
    pair.assert_whole()


def test_prefill_computes_nothing_before_decode_has_room() -> None:
    pair = Pair()
    pair.give(7, PROMPT)
    for _ in range(50):
        pair.prefill.step()
    assert pair.prefill.engine.steps == 0


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 21])
@pytest.mark.parametrize("max_tokens", [1, 2, 6])
def test_any_length(length: int, max_tokens: int) -> None:
    pair = Pair()
    taken = pair.take(7, PROMPT[:length], max_tokens)
    pair.give(7, PROMPT[:length])
    pair.settle()
    assert pair.decode.answers[taken].tokens == expected_answer(PROMPT[:length], max_tokens)
    pair.assert_whole()


@pytest.mark.parametrize("decode_first", [True, False])
def test_a_short_prompt_is_computed_by_decode_alone(decode_first: bool) -> None:
    pair = Pair(local_tokens=len(PROMPT))
    taken = pair.take(7, PROMPT, max_tokens=9) if decode_first else ""
    if decode_first:
        pair.settle()
        assert pair.decode.answers[taken].tokens == expected_answer(PROMPT, 9), "it waits for nobody"
    given = pair.give(7, PROMPT)
    taken = taken or pair.take(7, PROMPT, max_tokens=9)
    pair.settle()
    assert pair.decode.answers[taken].tokens == expected_answer(PROMPT, 9)
    refusal = pair.prefill.answers[given].last
    assert refusal is not None
    assert refusal.error_status == Declined.status
    assert pair.prefill.engine.steps == 0, "prefill computes nothing for it"
    counters = pair.decode.engine.taking.counters
    assert (counters.local_tokens, counters.tokens, counters.recomputed_tokens) == (len(PROMPT), 0, 0)
    pair.assert_whole()


def test_what_decode_has_cached_does_not_count_as_long() -> None:
    pair = Pair(local_tokens=8)
    first = pair.take(7, PROMPT, max_tokens=9)
    pair.give(7, PROMPT)
    pair.settle()
    turn = [*PROMPT, *pair.decode.answers[first].tokens, 3, 4]
    second = pair.take(8, turn, max_tokens=5)
    pair.give(8, turn)
    pair.settle()
    assert pair.decode.answers[second].tokens == expected_answer(turn, 5)
    assert pair.decode.engine.taking.counters.tokens == len(PROMPT), "the first turn alone was handed over"
    assert pair.decode.engine.taking.counters.local_tokens == len(turn) - 28  # seven full blocks were there
    pair.assert_whole()


def paced_pair() -> Pair:
    """Either engine is known to take a second for a token."""
    pair = Pair(local_tokens=1)
    pair.take(100, PROMPT, max_tokens=1)
    pair.decode.step()
    pair.clock.now += len(PROMPT)
    pair.give(100, PROMPT)
    pair.settle()
    pair.decode.engine.scheduler.pace.per_token_s = 1.0
    return pair


def test_a_prompt_that_others_stand_before_is_taken_back() -> None:
    pair = paced_pair()
    first, second = ([number, *PROMPT] for number in (30, 31))
    pair.take(0, first, max_tokens=5)
    pair.decode.step()
    pair.decode.tick()
    assert len(pair.decode.engine.taking) == 1, "it is next, and would be done no sooner here"
    pair.take(1, second, max_tokens=5)
    pair.decode.step()
    pair.decode.tick()
    assert len(pair.decode.engine.taking) == 1, "it is taken back"
    while pair.decode.step():
        pass
    assert (pair.decode.answers["take-0"].tokens, pair.decode.answers["take-1"].tokens) == (
        [],
        expected_answer(second, 5),
    )
    refused, given = pair.give(1, second), pair.give(0, first)
    pair.settle()
    assert pair.decode.answers["take-0"].tokens == expected_answer(first, 5)
    ended, done = pair.prefill.answers[refused].last, pair.prefill.answers[given].last
    assert ended is not None
    assert done is not None
    assert (ended.error_status, done.error) == (Declined.status, None)
    counters = pair.decode.engine.taking.counters
    assert (counters.local_tokens, counters.tokens, counters.recomputed_tokens) == (len(second), len(first), 0)
    pair.assert_whole()


def test_prompts_are_taken_back_one_at_a_time() -> None:
    pair = paced_pair()
    for session in range(4):
        pair.take(session, [30 + session, *PROMPT], max_tokens=5)
        pair.decode.engine.step()
    for _ in range(3):
        pair.decode.tick()
    assert len(pair.decode.engine.taking) == 3


def test_a_prompt_that_prefill_has_begun_is_not_taken_back() -> None:
    pair = paced_pair()
    for session in range(2):
        pair.take(session, [30 + session, *PROMPT], max_tokens=5)
        pair.decode.step()
    for handoff in pair.decode.engine.taking._handoffs.values():
        handoff.epoch = 1
    pair.decode.tick()
    assert len(pair.decode.engine.taking) == 2


def test_a_migration_request_is_always_read() -> None:
    """LMDeploy's order: prefill has computed the prompt before decode hears of it."""
    pair = Pair(local_tokens=len(PROMPT))
    pair.give(7, PROMPT, peer=None)
    pair.settle()
    taken = pair.take(7, PROMPT, 4, first_token=expected_answer(PROMPT, 1)[0])
    pair.settle()
    assert pair.decode.answers[taken].tokens == expected_answer(PROMPT, 4)
    assert pair.decode.engine.taking.counters.tokens == len(PROMPT)
    pair.assert_whole()


def test_chunks_are_pulled_while_prefill_runs() -> None:
    pair = Pair(budget=4)
    pair.take(7, PROMPT, 2)
    pair.give(7, PROMPT)
    pulled_early = False
    for _ in range(500):
        pair.turn()
        handoffs = pair.decode.engine.taking._handoffs.values()
        pulled_early |= any(handoff.num_pulled and not handoff.done for handoff in handoffs)
    assert pulled_early


def test_first_token_goes_out_before_the_last_pull() -> None:
    pair = Pair()
    taken = pair.take(7, PROMPT, 3)
    pair.give(7, PROMPT)
    for _ in range(200):
        pair.prefill.read_one()
        pair.prefill.step()
        pair.decode.read_one()
        pair.decode.step()
    assert pair.decode.answers[taken].tokens == expected_answer(PROMPT, 1)


def test_lmdeploy_order_prefills_whole_then_migrates() -> None:
    pair = Pair()
    given_id = pair.give(7, PROMPT, peer=None)
    pair.settle()
    answer = pair.prefill.answers[given_id]
    assert answer.last is not None
    assert answer.last.finish_reason is FinishReason.LENGTH
    assert len(answer.last.block_ids) == 6
    taken = pair.take(7, PROMPT, 5, first_token=answer.tokens[0])
    pair.settle()
    assert pair.decode.answers[taken].tokens == expected_answer(PROMPT, 5)
    pair.assert_whole()


@pytest.mark.parametrize(("session", "first_token"), [(8, None), (7, 96)])
def test_forged_migration_is_refused(session: int, first_token: int | None) -> None:
    pair = Pair()
    pair.give(7, PROMPT, peer=None)
    pair.settle()
    forged = pair.take(session, PROMPT, 5, first_token=0 if first_token is None else first_token)
    pair.settle()
    last = pair.decode.answers[forged].last
    assert last is not None
    assert (last.finish_reason, last.error_status) == (FinishReason.ERROR, 400)
    pair.settle(seconds=60)
    pair.assert_whole()


def test_migration_from_a_peer_that_is_gone_is_computed_here() -> None:
    """LMDeploy's proxy goes on with the link of a prefill engine that has restarted."""
    pair = Pair()
    pair.source.connected = False
    taken = pair.take(7, PROMPT, 5, first_token=0)
    pair.settle()
    assert pair.decode.answers[taken].tokens == expected_answer(PROMPT, 5)
    pair.assert_whole()


def test_migration_from_a_stranger_is_refused() -> None:
    pair = Pair()
    del pair.decode.sources[PREFILL]
    forged = pair.take(7, PROMPT, 5, first_token=0)
    pair.settle()
    last = pair.decode.answers[forged].last
    assert last is not None
    assert last.error_status == 400
    alone = pair.take(8, PROMPT, 5)
    pair.settle()
    assert pair.decode.answers[alone].tokens == expected_answer(PROMPT, 5)
    pair.assert_whole()


def test_unread_lease_expires() -> None:
    pair = Pair()
    pair.give(7, PROMPT, peer=None)
    pair.settle()
    assert pair.prefill.engine.scheduler.pool.num_free == 26
    pair.settle(seconds=21)
    pair.assert_whole()


def test_free_cache_frees_on_both_sides() -> None:
    pair = Pair()
    pair.give(7, PROMPT, peer=None)
    pair.settle()
    pair.prefill.engine.giving.free_session(7)
    pair.prefill.engine.giving.free_session(7)
    pair.assert_whole()


def test_decode_reads_the_prompt_itself_when_prefill_is_called_off() -> None:
    pair = Pair()
    taken = pair.take(7, PROMPT, 5)
    pair.decode.step()
    pair.decode.engine.taking.free_session(PREFILL, 7)
    pair.settle()
    assert pair.decode.answers[taken].tokens == expected_answer(PROMPT, 5)
    assert pair.decode.engine.taking.counters.recomputed_tokens == len(PROMPT)
    pair.settle(seconds=60)
    pair.assert_whole()


def test_silent_prefill_ends_in_recompute_at_the_deadline() -> None:
    pair = Pair()
    taken = pair.take(7, PROMPT, 5)
    pair.settle()
    assert pair.decode.answers[taken].tokens == []
    pair.settle(seconds=31)
    assert pair.decode.answers[taken].tokens == expected_answer(PROMPT, 5)
    pair.assert_whole()


def test_reader_gone_frees_the_owner() -> None:
    pair = Pair(budget=4)
    given_id = pair.give(7, PROMPT)
    pair.take(7, PROMPT, 5)
    for _ in range(20):
        pair.turn()
    pair.decode.alive = False
    pair.prefill.engine.giving.reader_lost(DECODE)
    pair.prefill.step()
    last = pair.prefill.answers[given_id].last
    assert last is not None
    assert last.error_status == 503
    pair.assert_whole()


def gives_up(pair: Pair) -> None:
    pair.decode.engine.taking.free_session(PREFILL, 7)


def falls_silent(pair: Pair) -> None:
    pair.clock.now += 21
    pair.prefill.tick()


@pytest.mark.parametrize("decode", [gives_up, falls_silent])
def test_what_decode_does_is_no_fault_of_prefill(decode: Callable[[Pair], None]) -> None:
    """A proxy that counts faults must not take out the healthy side: 4xx and 503 are none."""
    pair = Pair(budget=4)
    pair.take(7, PROMPT, 5)
    given_id = pair.give(7, PROMPT)
    pair.decode.step()
    pair.prefill.read_one()
    pair.prefill.step()
    decode(pair)
    pair.prefill.read_one()
    pair.prefill.step()
    last = pair.prefill.answers[given_id].last
    assert last is not None
    assert error_of(last.error_status, "").status in (409, 503)


def test_no_room_at_decode_is_no_fault_of_prefill() -> None:
    pair = Pair()
    given_id = pair.give(7, PROMPT)
    pair.settle(seconds=31)
    last = pair.prefill.answers[given_id].last
    assert last is not None
    assert last.error_status == 503


def test_preempted_sequences_say_the_same() -> None:
    """More requests than the pool holds: the youngest yield, recompute, and say the same tokens."""
    pair = Pair(num_blocks=14)
    taken = []
    for session in range(6):
        pair.give(session, PROMPT[: 5 + session])
        taken.append(pair.take(session, PROMPT[: 5 + session], 20))
    pair.settle()
    for session, request_id in enumerate(taken):
        assert pair.decode.answers[request_id].tokens == expected_answer(PROMPT[: 5 + session], 20)
    assert pair.decode.engine.scheduler.preemptions > 0
    pair.assert_whole()


def test_a_known_prefix_is_neither_computed_nor_pulled_again() -> None:
    pair = Pair()
    for session in (7, 8):
        pair.give(session, [*PROMPT, session])
        taken = pair.take(session, [*PROMPT, session], 3)
        pair.settle()
        assert pair.decode.answers[taken].tokens == expected_answer([*PROMPT, session], 3)
    assert pair.decode.engine.taking.counters.tokens == 22 + 2
    last = pair.decode.answers[taken].last
    assert last is not None
    assert last.cached_tokens == 20
    pair.assert_whole()


def test_cached_tokens_are_counted_once() -> None:
    """Also when the hand-off fails right after its first token."""
    pair = Pair()
    taken = pair.take(7, PROMPT, 5, first_token=1)
    pair.decode.step()
    pair.decode.engine.taking.told(PREFILL, msgspec.structs.replace(ANNOUNCED, num_cached=8))
    pair.decode.step()
    pair.decode.engine.taking.told(PREFILL, Fail(Key(7, 0), "expired", unknown=True))
    pair.decode.step()
    assert pair.decode.answers[taken].last is not None
    assert pair.decode.engine.requests.cached_tokens == 8


def test_a_salt_keeps_prefixes_apart() -> None:
    pair = Pair()
    for salt in ("a", "b", "a"):
        request = msgspec.structs.replace(toy_request(f"salted-{salt}", PROMPT, 1), cache_salt=salt)
        pair.decode.submit(request)
        pair.settle()
        cached = pair.decode.engine.requests.cached_tokens
        pair.decode.answers.clear()
    assert cached == 20


@pytest.mark.parametrize(
    "lie",
    [
        {"epoch": 0},
        {"epoch": -1},
        {"epoch_slot": -1},
        {"epoch_slot": epochs.OWNER_WORDS},
        {"epoch_slot": 2**64 - 1},
        {"blocks": []},
        {"blocks": [0, 1, 2, 3, 4, 32]},
        {"blocks": [0, 1, 2, 3, 4, -1]},
        {"blocks": [0, 1, 2, 3, 4, 2**64 - 1]},
        {"blocks": list(range(7))},
        {"num_computed": -1},
        {"num_computed": 20},
        {"num_computed": 2**64 - 1},
        {"first_token": -1},
        {"first_token": VOCABULARY},
        {"first_token": 2**64 - 1},
        {"logprobs": b"\xc1"},
        {"logprobs": b"\x91" * 100_000},
        {"logprobs": msgspec.msgpack.encode(TokenLogprobs(-0.5, [], []))},  # nobody asked for it
        {"num_cached": -1},
        {"num_cached": 2**64 - 1},
    ],
)
def test_what_cannot_be_is_not_believed(lie: dict[str, Any]) -> None:
    pair = Pair()
    taken = pair.take(7, PROMPT, 5)
    pair.decode.step()
    pair.decode.engine.taking.told(PREFILL, msgspec.structs.replace(ANNOUNCED, **lie))
    pair.settle(seconds=31)
    assert pair.decode.answers[taken].tokens == expected_answer(PROMPT, 5)
    assert pair.decode.engine.taking.counters.recomputed_tokens == len(PROMPT)
    pair.assert_whole()


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 1 << 32))
def test_random_orders_with_faults(seed: int) -> None:
    """Whatever happens in whatever order: right tokens or a true error, and whole pools."""
    chance = random.Random(seed)
    pair = Pair(num_blocks=chance.choice([8, 16, 40]), budget=chance.choice([3, 8, 64]), seed=seed)
    aborted, wanted = set(), {}
    for session in range(chance.randint(1, 8)):
        known = chance.choice([[], list(range(1, 13))])  # some prompts begin alike
        prompt = known + chance.choices(range(1, 90), k=chance.randint(1, 20 - len(known)))
        max_tokens = chance.randint(1, 10)
        sides = [
            lambda s=session, p=prompt: pair.give(s, p),
            lambda s=session, p=prompt, m=max_tokens: pair.take(s, p, m),
        ]
        if not pair.prefill.alive:
            sides = sides[1:]
        chance.shuffle(sides)
        for side in sides:
            side()
            for _ in range(chance.randint(0, 30)):
                pair.turn()
        wanted[f"take-{session}"] = (prompt, max_tokens)
        match chance.randint(0, 9):
            case 0:
                aborted.add(f"take-{session}")
                pair.decode.engine.abort(f"take-{session}")
            case 1 if pair.prefill.alive:
                pair.prefill.engine.abort(f"give-{session}")
            case 2 if pair.prefill.alive:
                pair.prefill.engine.giving.free_session(session)
            case 3:
                pair.decode.engine.taking.free_session(PREFILL, session)
            case 4:
                pair.clock.now += 25
            case 5 if pair.prefill.alive and chance.random() < 0.3:
                pair.kill_prefill()
            case 6:
                taking = pair.decode.engine.taking
                for silent in [handoff for handoff in taking._handoffs.values() if not handoff.begun]:
                    taking._take_back(silent)
    for _ in range(10):  # in a tiny pool the requests wait for each other's deadlines
        pair.settle(seconds=35)
    for request_id, (prompt, max_tokens) in wanted.items():
        answer = pair.decode.answers[request_id]
        if request_id not in aborted:
            assert answer.last is not None, f"{request_id} never ended"
            assert answer.tokens == expected_answer(prompt, max_tokens)
    pair.assert_whole()
