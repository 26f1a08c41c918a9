"""One engine core: what it is asked, and the step that answers. Read this first.

    submit ─▶ scheduler ─▶ schedule ─▶ execute ─▶ update ─▶ deltas
                  ▲                                 │
                  └── giving / taking (hand-offs) ──┘

Everything here runs on one thread and never waits; the process around it (engine/process.py) owns the sockets.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import islice

from engine.core import Delta, Give, Request, Sequence, Status, Step, StepOutput, Take, TokenLogprobs
from engine.drafts import count_accepted
from engine.migrate.giving import Giving
from engine.migrate.taking import Taking
from engine.requests import Requests
from engine.run.executor import Executor
from engine.scheduler import Scheduler

Sampled = tuple[int, TokenLogprobs | None]


class Engine:
    """Continuous batching over one executor, with both sides of a hand-off."""

    def __init__(
        self,
        executor: Executor,
        scheduler: Scheduler,
        requests: Requests,
        giving: Giving,
        taking: Taking,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.executor = executor
        self.scheduler = scheduler
        self.requests = requests
        self.giving = giving
        self.taking = taking
        self.clock = clock
        self.steps = 0

    def submit(self, request: Request) -> None:
        """Takes a request in. Validation is done: it fits the model and the pool."""
        sequence = self.requests.open(request, self.clock())
        match request.handoff:
            case Give():
                self.giving.expect(sequence)
            case Take():
                self.taking.expect(sequence)
            case None:
                self.scheduler.add(sequence)

    def abort(self, request_id: str) -> None:
        """The client went away. Idempotent; a request that has ended stays ended, and a lease it left stays alive."""
        sequence = self.requests.get(request_id)
        if sequence is None:
            return
        self.requests.discard(sequence)
        if sequence.status is Status.PULLING:
            self.taking.cancel(sequence)
        elif isinstance(sequence.request.handoff, Give):
            self.giving.cancel(sequence)
        else:
            self.scheduler.remove(sequence)

    def step(self) -> bool:
        """schedule, execute, update; False when there was nothing to compute."""
        began = self.clock()
        step = self.scheduler.schedule(began)
        for sequence in self.scheduler.take_reserved():
            self.taking.begin(sequence)
        if step is None:
            return False
        output = self.executor.execute(step)
        self._update(step, output)
        self.steps += 1
        self.scheduler.pace.observe(step.num_catching_up, self.clock() - began)
        return True

    def deltas(self) -> list[Delta]:
        """What there is to tell the API process since the last call."""
        return self.requests.drain()

    def check_integrity(self) -> None:
        """Every block is held by a sequence or free; an engine with nothing to hold holds nothing."""
        holders = [*self.scheduler.running, *self.scheduler.pulling, *self.giving.held()]
        held = {block for sequence in holders for block in sequence.block_table}
        pool = self.scheduler.pool
        assert len(held) + pool.num_free == pool.num_blocks, f"{len(held)} held, {pool.num_free} free: not all blocks"

    def _update(self, step: Step, output: StepOutput) -> None:
        sampled = zip(output.tokens, output.logprobs, strict=True)
        for row, (sequence, count) in enumerate(zip(step.sequences, step.num_new, strict=True)):
            samples, draft = step.samples(row), step.drafts.get(row, [])
            self.scheduler.computed(sequence, count)
            if samples:
                self._advance(sequence, draft, list(islice(sampled, 1 + len(draft))))
            elif isinstance(sequence.request.handoff, Give):
                self.giving.progress(sequence)

    def _advance(self, sequence: Sequence, draft: list[int], sampled: list[Sampled]) -> None:
        """`sampled`: its next token, and the one after each of its draft, which counts if all before it came true."""
        if isinstance(sequence.request.handoff, Give):
            self.giving.done(sequence, *sampled[0])
            return
        accepted = self._accept(sequence, draft, sampled)
        if draft:
            self.scheduler.drafter.settle(sequence, len(draft), accepted)

    def _accept(self, sequence: Sequence, draft: list[int], sampled: list[Sampled]) -> int:
        """How many of the draft came true before the answer ended."""
        accepted = count_accepted(draft, [token for token, _ in sampled])
        for place, (token, logprobs) in enumerate(sampled[: accepted + 1]):
            if place > 0:
                self.scheduler.computed(sequence, 1)
            if self.requests.append(sequence, token, logprobs):
                self.scheduler.remove(sequence)
                return place
        return accepted
