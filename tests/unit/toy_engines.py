"""Two engine cores and a network between them, all in one thread and on one clock, for tests that explore orders.

The executor stands in for a model: its "KV" is the token ids themselves, written into a real pool and read back through
the block table, and the next token depends on a checksum of all it reads. A block freed too early, copied wrongly or
believed too soon therefore changes the answer, just as it would with real attention.
"""

from __future__ import annotations

import random
import zlib
from collections import deque
from dataclasses import dataclass, field

import numpy as np

from engine.cache.leases import LeaseTable
from engine.cache.pool import BlockPool
from engine.cache.prefix import PrefixCache
from engine.core import Delta, Give, ModelInfo, Request, SamplingParams, Sequence, Step, StepOutput, Take
from engine.engine import Engine
from engine.migrate.giving import Giving
from engine.migrate.taking import Taking
from engine.requests import Requests
from engine.scheduler import Scheduler
from kvtransfer import epochs
from kvtransfer.copies import Copies
from kvtransfer.layout import KVLayout
from kvtransfer.protocol import FromOwner, FromReader, Release, Renew, Want
from kvtransfer.transfer import Pulled, PullFailed

VOCABULARY = 97
PERIOD = 3  # tokens: every other one repeats what was said so long ago, so that drafts are sometimes right
PREFILL, DECODE = "http://prefill", "http://decode"


def next_token(tokens: list[int]) -> int:
    number = zlib.crc32(np.array(tokens, np.float32).tobytes())
    return tokens[-PERIOD] if number % 2 and len(tokens) >= PERIOD else number % VOCABULARY


def expected_answer(prompt: list[int], max_tokens: int) -> list[int]:
    """What one engine with all the memory in the world would say."""
    tokens = list(prompt)
    for _ in range(max_tokens):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class ToyExecutor:
    """Implements engine.run.executor.Executor over [block][1][k|v][1][token][1] float32."""

    def __init__(self, layout: KVLayout) -> None:
        self.layout = layout
        self.region = bytearray(epochs.region_bytes(layout))
        pool = np.frombuffer(self.region, np.float32, layout.pool_bytes // 4)
        self.pool = pool.reshape(layout.num_blocks, 2, layout.block_size)

    def execute(self, step: Step) -> StepOutput:
        tokens = []
        for row, (sequence, count) in enumerate(zip(step.sequences, step.num_new, strict=True)):
            draft, known = step.drafts.get(row, []), len(sequence.tokens)
            for position in range(sequence.num_computed, sequence.num_computed + count + len(draft)):
                block, offset = divmod(position, self.layout.block_size)
                self.pool[sequence.block_table[block], :, offset] = (sequence.tokens + draft)[position]
            if step.samples(row):
                tokens += [next_token(self._read(sequence, known + more)) for more in range(len(draft) + 1)]
        return StepOutput(tokens, [None] * len(tokens))

    def _read(self, sequence: Sequence, num_tokens: int) -> list[int]:
        keys = self.pool[sequence.block_table, 0].reshape(-1)[:num_tokens]
        return [int(key) for key in keys]


class ToySource:
    """Implements handoff.Source: reads another engine's region, a piece at a time."""

    def __init__(self, reader: ToyEngine, owner: ToyEngine) -> None:
        self.reader, self.owner = reader, owner
        self.connected = True
        self.incarnation = owner.incarnation
        self.layout = owner.layout
        self.pulls: deque[tuple[int, list[list[int]]]] = deque()

    def send(self, message: FromReader) -> bool:
        self.owner.from_readers.append((self.reader.name, message))
        return self.owner.alive

    def pull(self, transfer_id: int, copies: Copies, deadline_s: float) -> None:
        self.pulls.append((transfer_id, copies.tolist()))

    def advance(self) -> None:
        """Makes the next copy, or tells that the last one was made."""
        if not self.pulls:
            return
        transfer_id, copies = self.pulls[0]
        if not self.owner.alive:
            self.pulls.popleft()
            self.reader.engine.taking.pull_failed(PullFailed(transfer_id, "the owner died"))
        elif copies:
            source, destination, length = copies.pop(0)
            piece = self.owner.executor.region[source : source + length]
            self.reader.executor.region[destination : destination + length] = piece
        else:
            self.pulls.popleft()
            self.reader.engine.taking.pulled(Pulled(transfer_id, 0, 0.0))


@dataclass
class Answer:
    tokens: list[int] = field(default_factory=list)
    last: Delta | None = None


class ToyEngine:
    """One engine core with its inboxes."""

    def __init__(
        self, name: str, clock: Clock, num_blocks: int, block_size: int, budget: int, local_tokens: int = 0
    ) -> None:
        self.name, self.alive, self.incarnation = name, True, f"{name}-1"
        self.layout = KVLayout(
            num_blocks=num_blocks, block_size=block_size, num_layers=1, num_kv_heads=1, head_dim=1, dtype="float32"
        )
        self.executor = ToyExecutor(self.layout)
        region = memoryview(self.executor.region)
        model = ModelInfo(
            name="toy",
            max_model_len=num_blocks * block_size,
            vocab_size=VOCABULARY,
            eos_token_ids=(),
            num_blocks=num_blocks,
            block_size=block_size,
            dtype="float32",
            device="cpu",
            num_parameters=0,
            load_seconds=0.0,
        )
        self.sources: dict[str, ToySource] = {}
        self.readers: dict[str, ToyEngine] = {}
        self.from_readers: deque[tuple[str, FromReader]] = deque()
        self.from_owners: deque[tuple[str, FromOwner]] = deque()
        self.answers: dict[str, Answer] = {}
        requests = Requests(model)
        pool = BlockPool(num_blocks, block_size)
        scheduler = Scheduler(pool, PrefixCache(pool), 8, budget, draft_rows=16, max_draft_tokens=15)
        leases = LeaseTable(epochs.owner_words(self.layout, region), 20.0, clock)
        giving = Giving(scheduler, requests, leases, self._send_to_reader, self.incarnation, 30.0, clock)
        words = epochs.reader_words(self.layout, region)
        taking = Taking(scheduler, requests, self.layout, words, self.sources.get, 30.0, 5.0, local_tokens, clock)
        self.engine = Engine(self.executor, scheduler, requests, giving, taking, clock)
        self.clock = clock

    def reads_from(self, owner: ToyEngine) -> ToySource:
        source = self.sources[owner.name] = ToySource(self, owner)
        owner.readers[self.name] = self
        return source

    def submit(self, request: Request) -> None:
        self.answers[request.id] = Answer()
        self.engine.submit(request)

    def step(self) -> bool:
        busy = self.engine.step()
        for delta in self.engine.deltas():
            answer = self.answers[delta.request_id]
            assert answer.last is None, f"{delta.request_id} was told more after its end"
            answer.tokens += delta.tokens
            if delta.finish_reason is not None:
                answer.last = delta
        self.engine.check_integrity()
        return busy

    def read_one(self) -> None:
        """One message from each side."""
        if self.from_readers:
            reader, message = self.from_readers.popleft()
            match message:
                case Want():
                    self.engine.giving.want(reader, message)
                case Release():
                    self.engine.giving.release(reader, message)
                case Renew():
                    self.engine.giving.renew(reader, message)
        if self.from_owners:
            self.engine.taking.told(*self.from_owners.popleft())  # type: ignore[arg-type]

    @property
    def has_mail(self) -> bool:
        return bool(self.from_readers or self.from_owners)

    def tick(self) -> None:
        self.engine.giving.tick()
        self.engine.taking.tick()

    def _send_to_reader(self, reader: str, message: FromOwner) -> bool:
        engine = self.readers.get(reader)
        if engine is None or not engine.alive:
            return False
        engine.from_owners.append((self.name, message))
        return True


class Pair:
    """A prefill and a decode engine."""

    def __init__(
        self, num_blocks: int = 32, block_size: int = 4, budget: int = 8, seed: int = 0, local_tokens: int = 0
    ) -> None:
        self.clock, self.random = Clock(), random.Random(seed)
        self.prefill = ToyEngine(PREFILL, self.clock, num_blocks, block_size, budget)
        self.decode = ToyEngine(DECODE, self.clock, num_blocks, block_size, budget, local_tokens)
        self.source = self.decode.reads_from(self.prefill)

    def give(self, session: int, prompt: list[int], peer: str | None = DECODE, max_tokens: int = 1) -> str:
        request = toy_request(f"give-{session}", prompt, max_tokens, Give(session=session, peer=peer))
        self.prefill.submit(request)
        return request.id

    def take(self, session: int, prompt: list[int], max_tokens: int, first_token: int | None = None) -> str:
        handoff = Take(session=session, peer=PREFILL, first_token=first_token)
        request = toy_request(f"take-{session}", prompt, max_tokens, handoff)
        self.decode.submit(request)
        return request.id

    def turn(self) -> None:
        """Something happens somewhere."""
        actions = [self.decode.read_one, self.decode.step, self.source.advance]
        if self.prefill.alive:
            actions += [self.prefill.read_one, self.prefill.step]
        self.random.choice(actions)()

    def settle(self, seconds: float = 0.0) -> None:
        """Lets the clock run and everything happen until nothing does."""
        self.clock.now += seconds
        for _ in range(20_000):
            engines = [engine for engine in (self.prefill, self.decode) if engine.alive]
            self.source.advance()
            for engine in engines:
                engine.read_one()
                engine.tick()
            busy = [engine.step() for engine in engines]  # all of them, so no `any` around it
            if not any(busy) and not self.source.pulls and not any(engine.has_mail for engine in engines):
                return
        raise AssertionError("the engines never came to rest")

    def kill_prefill(self) -> None:
        self.prefill.alive = False
        del self.decode.sources[PREFILL]
        while self.source.pulls:
            self.source.advance()
        self.decode.engine.taking.source_lost(PREFILL, "killed")

    def assert_whole(self) -> None:
        for engine in (self.prefill, self.decode):
            if engine.alive:
                pool = engine.engine.scheduler.pool
                assert pool.num_free == pool.num_blocks, f"{engine.name} kept {pool.num_blocks - pool.num_free} blocks"
                assert len(engine.engine.requests) == 0
                assert len(engine.engine.giving) == len(engine.engine.taking) == 0


def toy_request(request_id: str, prompt: list[int], max_tokens: int, handoff: Give | Take | None = None) -> Request:
    sampling = SamplingParams(max_tokens=max_tokens, seed=0, temperature=0.0)
    return Request(id=request_id, prompt=prompt, sampling=sampling, handoff=handoff)
