"""Which sequences compute how many tokens in the next step.

Each step gives sequences tokens until their computed tokens catch up with their known ones; that one rule is chunked
prefill, decode and recompute after preemption alike. Sequences that only need one token are always served; the rest of
the step's token budget goes to those that catch up, the most urgent first (engine/pace.py), so several prompts share a
step and a short one does not wait behind a long one.

Blocks: a sequence enters only when all its known tokens fit; while it grows, the youngest running sequence yields (its
blocks are freed, it will recompute). The oldest never yields to anyone, so something always progresses.
"""

from __future__ import annotations

from bisect import insort

from engine.cache.pool import BlockPool
from engine.cache.prefix import PrefixCache
from engine.core import Give, Sequence, Status, Step
from engine.drafts import Drafter
from engine.pace import MIN_CHUNK, Pace, urgency


def seniority(sequence: Sequence) -> tuple[int, float]:
    """Sort key: who comes first yields last."""
    return sequence.request.priority, sequence.arrival


class Scheduler:
    """Owns the order of sequences and their block tables. Never imports torch, never waits."""

    def __init__(
        self,
        pool: BlockPool,
        prefixes: PrefixCache,
        max_num_seqs: int,
        token_budget: int,
        beside_streams: int | None = None,
        draft_rows: int = 0,
        max_draft_tokens: int = 0,
    ) -> None:
        """Tokens: `token_budget` of a step, `beside_streams` of one with running answers, theirs included, `draft_rows`
        of one with drafts, and `max_draft_tokens` of a sequence's draft."""
        self.pool = pool
        self.prefixes = prefixes
        self.max_num_seqs = max_num_seqs
        self.token_budget = token_budget
        self.beside_streams = token_budget if beside_streams is None else beside_streams
        self.draft_rows = draft_rows
        self.pace = Pace()
        self.drafter = Drafter(max_draft_tokens)
        self.waiting: list[Sequence] = []  # by seniority: WAITING and RESERVING
        self.running: list[Sequence] = []  # by seniority: RUNNING
        self.pulling: set[Sequence] = set()  # PULLING: hold blocks, compute nothing
        self.preemptions = 0
        self._reserved: list[Sequence] = []

    def add(self, sequence: Sequence) -> None:
        """Takes in a sequence that holds no blocks: WAITING to compute, or RESERVING room for a hand-off."""
        assert not sequence.block_table, "a new sequence holds no blocks"
        insort(self.waiting, sequence, key=seniority)

    def num_uncached(self, sequence: Sequence) -> int:
        """Known tokens whose KV no block of ours has now."""
        return len(sequence.tokens) - len(self.prefixes.match(sequence)) * self.pool.block_size

    def resume(self, sequence: Sequence, num_computed: int) -> None:
        """PULLING ─▶ RUNNING: the first `num_computed` tokens are in its blocks, the rest will be computed here."""
        self.pulling.discard(sequence)
        sequence.status = Status.RUNNING
        self.computed(sequence, num_computed - sequence.num_computed)
        insort(self.running, sequence, key=seniority)

    def computed(self, sequence: Sequence, count: int) -> None:
        """`count` more tokens are in its blocks; those filled by them can be shared from now on."""
        before = sequence.num_computed
        sequence.num_computed += count
        self.prefixes.insert(sequence, before)

    def hold(self, sequence: Sequence) -> None:
        """RUNNING ─▶ HELD: it computes no more, its blocks belong to a lease now."""
        self.running.remove(sequence)
        sequence.status = Status.HELD

    def remove(self, sequence: Sequence) -> None:
        """Any state ─▶ FINISHED: frees its blocks."""
        match sequence.status:
            case Status.WAITING | Status.RESERVING:
                self.waiting.remove(sequence)
            case Status.RUNNING:
                self.running.remove(sequence)
            case Status.PULLING:
                self.pulling.discard(sequence)
        sequence.status = Status.FINISHED
        self._free(sequence)

    @property
    def is_catching_up(self) -> bool:
        """Whether a running sequence has more than a step's single token to compute."""
        return any(sequence.num_missing > 1 for sequence in self.running)

    def seconds_to_catch_up(self, num_tokens: int) -> float:
        """How long so many tokens would take beside the streams that run now."""
        chunk = self._chunk_budget(sum(sequence.num_missing == 1 for sequence in self.running))
        return self.pace.seconds_for(num_tokens) + -(-num_tokens // chunk) * self.pace.base_s

    def take_reserved(self) -> list[Sequence]:
        """Sequences whose blocks the last `schedule` reserved for a hand-off; the caller starts to pull them."""
        reserved, self._reserved = self._reserved, []
        return reserved

    def schedule(self, now: float) -> Step | None:
        """The next step, its blocks allocated; None when nothing can compute now."""
        step = Step([], [])
        self._continue_decoding(step)
        self._catch_up(step, self._chunk_budget(len(step.sequences)), now)
        self._draft(step)
        return step if step.sequences else None

    def _continue_decoding(self, step: Step) -> None:
        """Blocks for everyone that grows, and one token for every sequence that has caught up. Oldest first: who yields
        is always further down the list, and not in the step yet."""
        position = 0
        while position < len(self.running):
            sequence = self.running[position]
            if self._grow(sequence) and sequence.num_missing == 1:
                step.sequences.append(sequence)
                step.num_new.append(1)
            position += 1

    def _chunk_budget(self, num_decoding: int) -> int:
        """Tokens for those that catch up: what is left of the step, within the pace that running streams want, and
        those that are about to run."""
        budget = max(self.token_budget - num_decoding, 1)
        if num_decoding or self.pulling:
            budget = min(budget, max(self.beside_streams - num_decoding, MIN_CHUNK))
        limits = [
            s.request.slo_tpot_ms for s in self.running if s.num_missing == 1 and s.request.slo_tpot_ms is not None
        ]
        return self.pace.tokens_within(min(limits) / 1e3, budget) if limits else budget

    def _catch_up(self, step: Step, budget: int, now: float) -> None:
        """Shares the budget among the running that catch up and the waiting, the most urgent first. When a waiting one
        does not fit the pool, none overtakes it: its turn must come."""
        room = self.max_num_seqs - len(self.running) - len(self.pulling)
        candidates = [sequence for sequence in self.running if sequence.num_missing > 1 and self._covered(sequence)]
        candidates += self.waiting if room > 0 else []
        for sequence in sorted(candidates, key=lambda candidate: urgency(candidate, self.pace, now)):
            if sequence.status is not Status.RUNNING:
                if room <= 0 or (budget == 0 and sequence.status is Status.WAITING):
                    continue
                if not self._reserve(sequence):
                    room = 0
                    continue
                self._admit(sequence)
                room -= 1
            if sequence.status is Status.RUNNING and budget > 0:
                count = min(sequence.num_missing, budget)
                step.sequences.append(sequence)
                step.num_new.append(count)
                budget -= count

    def _draft(self, step: Step) -> None:
        """What room the answers of a small step leave, they share for tokens that they may say next."""
        room = self.draft_rows - sum(step.num_new)
        if room <= 0:
            return
        answers = [
            row
            for row, sequence in enumerate(step.sequences)
            if sequence.num_missing == 1 and not isinstance(sequence.request.handoff, Give)
        ]
        share = room // max(len(answers), 1)
        for row in answers:
            sequence = step.sequences[row]
            draft = self.drafter.draft(sequence, share)
            if draft and self._cover(sequence, len(draft)):
                step.drafts[row] = draft

    def _admit(self, sequence: Sequence) -> None:
        """Its blocks are reserved: WAITING ─▶ RUNNING, or RESERVING ─▶ PULLING."""
        self.waiting.remove(sequence)
        if sequence.status is Status.RESERVING:
            sequence.status = Status.PULLING
            self.pulling.add(sequence)
            self._reserved.append(sequence)
        else:
            sequence.status = Status.RUNNING
            insort(self.running, sequence, key=seniority)

    def _grow(self, sequence: Sequence) -> bool:
        """Blocks for all its known tokens, taken from the youngest if need be; False when it must sit this step out."""
        wanted = self.pool.blocks_for(len(sequence.tokens)) - len(sequence.block_table)
        while wanted > self.pool.num_free:
            victim = self._youngest_after(sequence)
            if victim is None:
                return False
            self._preempt(victim)
        sequence.block_table += self.pool.allocate(max(wanted, 0))
        return True

    def _cover(self, sequence: Sequence, num_more: int) -> bool:
        """Blocks for so many more tokens than it knows, unless a running sequence might soon miss them."""
        wanted = max(self.pool.blocks_for(len(sequence.tokens) + num_more) - len(sequence.block_table), 0)
        if wanted and wanted + len(self.running) + len(self.pulling) > self.pool.num_free:
            return False
        sequence.block_table += self.pool.allocate(wanted)
        return True

    def _covered(self, sequence: Sequence) -> bool:
        return len(sequence.block_table) * self.pool.block_size >= len(sequence.tokens)

    def _youngest_after(self, sequence: Sequence) -> Sequence | None:
        """A hand-off in the making never yields: its blocks are being read, and it grows no further."""
        for candidate in reversed(self.running):
            if candidate is sequence:
                return None
            if not isinstance(candidate.request.handoff, Give):
                return candidate
        return None

    def _preempt(self, victim: Sequence) -> None:
        """RUNNING ─▶ WAITING: forgets what it computed, keeps what it knows."""
        self.running.remove(victim)
        self._free(victim)
        victim.status, victim.num_computed = Status.WAITING, 0
        self.preemptions += 1
        self.add(victim)

    def _reserve(self, sequence: Sequence) -> bool:
        """Blocks for all its known tokens, those of a known prefix shared; leaves one for each running sequence to grow
        into (or the newcomer would soon be preempted); alone it may take the last block."""
        shared = self.prefixes.match(sequence)
        wanted = self.pool.blocks_for(len(sequence.tokens)) - len(shared)
        spare = len(self.running) + len(self.pulling) + sum(map(self.pool.is_kept, shared))
        if wanted + spare > self.pool.num_free:
            return False
        self.pool.share(shared)
        sequence.block_table = shared + self.pool.allocate(wanted)
        sequence.num_computed = len(shared) * self.pool.block_size
        if sequence.num_output == 0:
            sequence.num_cached = sequence.num_computed
        return True

    def _free(self, sequence: Sequence) -> None:
        self.pool.free(sequence.block_table)
        sequence.block_table = []
