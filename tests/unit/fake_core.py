"""A stand-in for the engine core, for tests of the API process alone. The cluster tests drive the real one.

It keeps CoreClient's contract: deltas end with a finish reason, closing the iterator early is an abort, errors are
raised where the real one raises them.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence

import msgspec

from engine.core import Delta, FinishReason, Give, ModelInfo, Request, TokenLogprobs
from engine.messages import Initialize, LinkCommand, Stats
from kvtransfer.layout import KVLayout
from kvtransfer.protocol import PROTOCOL_VERSION, EndpointInfo

Script = Callable[[Request], Sequence[Delta | Exception]]

MODEL = ModelInfo(
    name="tiny",
    max_model_len=512,
    vocab_size=49_152,
    eos_token_ids=(2,),
    num_blocks=64,
    block_size=16,
    dtype="float32",
    device="cpu",
    num_parameters=1,
    load_seconds=0.0,
)
LAYOUT = KVLayout(num_blocks=64, block_size=16, num_layers=2, num_kv_heads=1, head_dim=8, dtype="float32")
STATS = Stats(
    num_waiting=1,
    waiting_tokens=2,
    num_running=3,
    num_handoff=0,
    blocks_free=60,
    blocks_total=64,
    steps=5,
    prompt_tokens=6,
    output_tokens=7,
    cached_tokens=0,
    draft_tokens=0,
    accepted_tokens=0,
    preemptions=0,
    transferred_tokens=0,
    recomputed_tokens=0,
    local_tokens=0,
    transferred_bytes=0,
    pull_seconds=0.0,
    exposed_seconds=0.0,
)


class FakeCore:
    """`script` says what each request is answered; set `gate` to hold every answer after its first delta."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.model = MODEL
        self.control_address = "tcp://127.0.0.1:5555"
        self.incarnation = "one"
        self.stats: Stats | None = STATS
        self.alive = True
        self.silent_s = 0.0
        self.gate: asyncio.Event | None = None
        self.requests: list[Request] = []
        self.aborted: list[str] = []
        self.running: set[str] = set()
        self.changed = asyncio.Condition()
        self.commands: list[LinkCommand] = []
        self.refusal: Exception | None = None

    async def generate(self, request: Request) -> AsyncGenerator[Delta]:
        self.requests.append(request)
        self.running.add(request.id)
        finished = False
        try:
            for said in self.script(request):
                if isinstance(said, Exception):
                    finished = True
                    raise said
                finished = said.finish_reason is not None
                yield msgspec.structs.replace(said, request_id=request.id)
                if self.gate is not None:
                    await self.gate.wait()
                else:
                    await asyncio.sleep(0)
        finally:
            self.running.discard(request.id)
            if not finished:
                self.aborted.append(request.id)
            async with self.changed:
                self.changed.notify_all()

    async def until_idle(self) -> None:
        async with asyncio.timeout(5), self.changed:
            await self.changed.wait_for(lambda: not self.running)

    async def call(self, command: LinkCommand) -> bytes:
        if self.refusal is not None:
            raise self.refusal
        self.commands.append(command)
        if isinstance(command, Initialize):
            return msgspec.msgpack.encode(endpoint_info(command.me))
        return msgspec.msgpack.encode(None)


def endpoint_info(engine_id: str) -> EndpointInfo:
    return EndpointInfo(
        tandem=PROTOCOL_VERSION,
        engine_id=engine_id,
        incarnation="one",
        model="tiny",
        layout=LAYOUT,
        offers=[],
        routing_id="aa",
        secret="bb",
    )


def says(tokens: Sequence[int], reason: FinishReason = FinishReason.STOP, cached: int = 0) -> Script:
    """One token a delta, with logprobs where they were asked for; a Give says one token and its blocks."""

    def script(request: Request) -> list[Delta]:
        wanted = request.sampling.logprobs
        said = list(tokens[: request.sampling.max_tokens])
        deltas = [
            Delta(
                request_id="",
                tokens=[token],
                logprobs=[TokenLogprobs(-0.5, [token, 5][:wanted], [-0.5, -1.5][:wanted])]
                if wanted is not None
                else [],
            )
            for token in said
        ]
        deltas[0].cached_tokens = cached
        deltas[-1].finish_reason = reason if len(said) == len(tokens) else FinishReason.LENGTH
        if isinstance(request.handoff, Give):
            deltas[-1].block_ids = [10 * request.handoff.index + 1, 10 * request.handoff.index + 2]
        return deltas

    return script
