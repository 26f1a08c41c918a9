"""What a step may promise: streams always move, short prompts do not wait behind long ones, nothing starves."""

from __future__ import annotations

import msgspec

from engine.cache.pool import BlockPool
from engine.cache.prefix import PrefixCache
from engine.core import Sequence, Status
from engine.pace import Pace, urgency
from engine.scheduler import Scheduler
from tests.unit.toy_engines import toy_request


def scheduler(num_blocks: int = 1024, budget: int = 64, max_num_seqs: int = 8) -> Scheduler:
    pool = BlockPool(num_blocks, 4)
    made = Scheduler(pool, PrefixCache(pool), max_num_seqs, budget)
    made.pace.observe(100, 1.0)  # 10 ms a token
    return made


def add(to: Scheduler, name: str, length: int, arrival: float = 0.0, **request: float) -> Sequence:
    made = toy_request(name, [hash((name, i)) % 1000 for i in range(length)], 10)
    sequence = Sequence.of(msgspec.structs.replace(made, **request), arrival)
    to.add(sequence)
    return sequence


def run(one: Scheduler, now: float) -> dict[str, int]:
    """One step: tokens by request."""
    step = one.schedule(now)
    if step is None:
        return {}
    for sequence, count in zip(step.sequences, step.num_new, strict=True):
        one.computed(sequence, count)
        if sequence.num_missing == 0:
            sequence.tokens.append(0)
    return {sequence.request.id: count for sequence, count in zip(step.sequences, step.num_new, strict=True)}


def test_streams_move_in_every_step() -> None:
    one = scheduler(budget=16)
    for index in range(4):
        add(one, f"stream-{index}", 1)
    run(one, 0)
    add(one, "long", 400)
    for _ in range(5):
        counts = run(one, 0)
        assert [counts[f"stream-{index}"] for index in range(4)] == [1, 1, 1, 1]
        assert counts["long"] == 12


def test_a_short_prompt_overtakes_a_long_one_under_way() -> None:
    one = scheduler(budget=64)
    add(one, "long", 4000)
    assert run(one, 0) == {"long": 64}
    add(one, "short", 20, arrival=0.1)
    assert run(one, 0.1) == {"short": 20, "long": 44}


def test_a_short_prompt_hardly_waits_behind_a_long_one_that_has_waited_for_longer_than_it_takes() -> None:
    """As where running streams leave prompts little of each step."""
    one = scheduler(budget=64)
    add(one, "long", 400)  # 4 s of work
    add(one, "short", 20, arrival=8.0)  # 0.2 s
    assert run(one, 8.0) == {"short": 20, "long": 44}


def test_the_last_of_a_long_prompt_goes_before_a_short_one_that_just_came() -> None:
    one = scheduler(budget=64)
    long = add(one, "long", 400)
    while long.num_missing > 80:  # 0.8 s of work
        run(one, 0.0)
    add(one, "short", 20, arrival=8.0)
    assert run(one, 8.0) == {"long": 64}
    assert run(one, 8.1) == {"long": 16, "short": 20}


def test_of_equals_the_one_under_way_goes_on() -> None:
    one = scheduler(budget=64)
    add(one, "first", 200)
    run(one, 0.0)
    add(one, "second", 200, arrival=0.5)
    assert run(one, 1.0) == {"first": 64}


def test_a_long_prompt_does_not_starve() -> None:
    one = scheduler(budget=64)
    long = add(one, "long", 400)  # 4 s of work
    turns = 0
    while long.num_output == 0:
        turns += 1
        add(one, f"short-{turns}", 64, arrival=float(turns))  # would fill every step
        run(one, float(turns))
        for sequence in [s for s in one.running if s.num_missing == 1 and s.request.id != "long"]:
            one.remove(sequence)
        assert turns < 20


def test_an_urgent_deadline_goes_first_and_a_lost_one_does_not() -> None:
    pace = Pace()
    pace.observe(100, 1.0)
    plain = Sequence.of(toy_request("plain", [1] * 50, 1), 0.0)
    urgent = Sequence.of(msgspec.structs.replace(toy_request("urgent", [1] * 100, 1), slo_ttft_ms=1100.0), 0.0)
    late = Sequence.of(msgspec.structs.replace(toy_request("late", [1] * 100, 1), slo_ttft_ms=200.0), 0.0)
    order = sorted([late, plain, urgent], key=lambda sequence: urgency(sequence, pace, 0.0))
    assert [sequence.request.id for sequence in order] == ["urgent", "plain", "late"]


def test_chunks_shrink_to_keep_a_streams_pace() -> None:
    one = scheduler(budget=64)
    one.pace.base_s = 0.05
    add(one, "stream", 1, slo_tpot_ms=300.0)
    run(one, 0)
    add(one, "long", 400)
    assert run(one, 0) == {"stream": 1, "long": 25}  # (300 ms - 50 ms) at 10 ms a token


def test_the_youngest_yields_and_the_oldest_progresses() -> None:
    one = scheduler(num_blocks=4)
    old, young = add(one, "old", 7, arrival=0.0), add(one, "young", 3, arrival=1.0)
    run(one, 0)
    assert (old.status, young.status) == (Status.RUNNING, Status.RUNNING)
    for _ in range(6):
        assert "old" in run(one, 0)
    assert (old.status, young.status, young.block_table) == (Status.RUNNING, Status.WAITING, [])
    assert one.preemptions == 1


def test_what_does_not_fit_is_not_overtaken() -> None:
    one = scheduler(num_blocks=8)
    add(one, "first", 20)
    run(one, 0)
    add(one, "large", 16, arrival=1.0)
    add(one, "small", 2, arrival=99.0)
    assert run(one, 100.0) == {"first": 1}
    assert len(one.waiting) == 2


def test_kept_blocks_are_evicted_last_block_first() -> None:
    pool = BlockPool(4, 4)
    blocks = pool.allocate(3)
    for block in blocks:
        pool.label(block, bytes([block]))
    pool.free(blocks)
    assert (pool.num_free, pool.num_kept) == (4, 3)
    pool.allocate(2)
    assert [pool.find(bytes([block])) for block in blocks] == [blocks[0], blocks[1], None]


def test_any_wish_for_speed_makes_a_chunk() -> None:
    """A client may ask for whatever a float can hold."""
    pace = Pace()
    pace.observe(100, 0.05)
    assert [pace.tokens_within(seconds, 512) for seconds in (1e-308, 0.02, 1.7e305, 1.7e308)] == [16, 40, 512, 512]


def drafting(num_blocks: int = 1024) -> Scheduler:
    pool = BlockPool(num_blocks, 4)
    return Scheduler(pool, PrefixCache(pool), 32, 64, draft_rows=16, max_draft_tokens=15)


def repeating(to: Scheduler, name: str) -> Sequence:
    """One that writes, and of which drafts of any length have been right."""
    sequence = Sequence.of(toy_request(name, [5] * 4, 100), 0.0)
    to.add(sequence)
    run(to, 0.0)
    for running in to.running:
        running.tokens[-1] = 5
    to.drafter.draft(sequence, 1)
    to.drafter.settle(sequence, 15, 15)
    return sequence


def test_drafts_share_the_rows_that_answers_leave() -> None:
    one = drafting()
    for index, share in enumerate((15, 7, 4, 3)):
        repeating(one, str(index))
        step = one.schedule(0.0)
        assert step is not None
        assert [len(draft) for draft in step.drafts.values()] == [share] * (index + 1)
    for index in range(4, 9):
        repeating(one, str(index))
    step = one.schedule(0.0)
    assert step is not None
    assert step.drafts == {}


def test_nothing_is_drafted_beside_a_prompt() -> None:
    one = drafting()
    repeating(one, "writes")
    add(one, "reads", 40)
    step = one.schedule(0.0)
    assert step is not None
    assert step.drafts == {}


def test_drafts_take_no_block_that_a_running_sequence_may_need() -> None:
    one = drafting(num_blocks=4)  # its tokens fill two; the draft would need four more
    sequence = repeating(one, "writes")
    step = one.schedule(0.0)
    assert step is not None
    assert step.drafts == {}
    assert len(sequence.block_table) == 2
