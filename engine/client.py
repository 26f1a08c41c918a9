"""The API process's side of the core: have it load, submit requests, read their deltas, and never lose one.

generate() ──Submit──▶ core        one PAIR socket in a private directory; msgpack both ways
   ▲                     │
Mailbox ◀──Deltas (one message a step) ──┘
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import shutil
import tempfile
import time
from collections.abc import AsyncIterator
from typing import Self
from urllib.parse import urlsplit

import msgspec
import zmq

from engine.api.errors import DeadlineExceeded, InvalidRequest, Overloaded, Unavailable, error_of
from engine.child import CoreChild
from engine.config import EngineSettings
from engine.core import Delta, FinishReason, ModelInfo, Request
from engine.messages import (
    MAX_QUEUED_MESSAGES,
    Abort,
    Call,
    CoreSettings,
    Deltas,
    FromCore,
    LinkCommand,
    Ready,
    Reply,
    Stats,
    Submit,
    ToCore,
)

logger = logging.getLogger(__name__)

WILDCARDS = ("0.0.0.0", "::", "")
CALL_TIMEOUT_S = 10.0
STOP_TIMEOUT_S = 5.0

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(FromCore).decode


def core_settings(settings: EngineSettings) -> CoreSettings:
    """The core's part of the settings."""
    host = settings.transfer_host or settings.host
    if host in WILDCARDS and settings.advertise_url:
        host = urlsplit(settings.advertise_url).hostname or host
    return CoreSettings(
        model=settings.model,
        served_model_name=settings.model_name,
        role=settings.role,
        dtype=settings.dtype,
        quantization=settings.quantization,
        device=settings.device,
        num_threads=settings.num_threads,
        cpu_cores=settings.cpu_cores,
        max_model_len=settings.max_model_len,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        kv_cache_bytes=int(settings.kv_cache_memory),
        block_size=settings.block_size,
        prefix_cache=settings.prefix_cache,
        transports=settings.transports,
        require_transport=settings.require_transport,
        transfer_host=host,
        cluster_key=settings.cluster_key.get_secret_value().encode() if settings.cluster_key else b"",
        lease_seconds=settings.lease_seconds,
        handoff_timeout=settings.handoff_timeout,
        local_prefill_tokens=settings.local_prefill_tokens,
        max_draft_tokens=settings.max_draft_tokens,
        log_level=settings.log_level,
    )


class Mailbox:
    """What one request has been told and its reader has not yet read: at most one delta, merged."""

    def __init__(self) -> None:
        self._delta: Delta | None = None
        self._arrival: asyncio.Future[None] | None = None  # while the reader waits
        self._expired = False

    def put(self, delta: Delta) -> None:
        if self._expired:
            return
        waiting = self._delta
        if waiting is None:
            self._delta = delta
        elif waiting.finish_reason is None:  # nothing comes after the end
            waiting.tokens += delta.tokens
            waiting.logprobs += delta.logprobs
            waiting.finish_reason, waiting.error = delta.finish_reason, delta.error
            waiting.error_status, waiting.block_ids = delta.error_status, delta.block_ids
        self._wake()

    def expire(self) -> None:
        """The reader's time is up: what came in time it may still read, then `get` raises TimeoutError."""
        self._expired = True
        self._wake()

    async def get(self) -> Delta:
        if self._delta is None and not self._expired:
            self._arrival = asyncio.get_running_loop().create_future()
            await self._arrival
        delta, self._delta = self._delta, None
        if delta is None:
            assert self._expired, "one reader a mailbox"
            raise TimeoutError
        return delta

    def _wake(self) -> None:
        if self._arrival is not None and not self._arrival.done():
            self._arrival.set_result(None)


class CoreClient:
    """One per API process. Every method belongs to the event loop's thread."""

    model: ModelInfo
    control_address: str
    incarnation: str

    def __init__(self, settings: EngineSettings, child: CoreChild) -> None:
        self.stats: Stats | None = None
        self._settings = settings
        self._child = child
        self._mailboxes: dict[str, Mailbox] = {}
        self._calls: dict[int, asyncio.Future[Reply]] = {}
        self._next_call = 0
        self._tokens_per_s = 0.0
        self._stats_at = 0.0
        self._directory = tempfile.mkdtemp(prefix="tandem-")  # mode 0700: only this user can speak to the core
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.PAIR)
        self._address = f"ipc://{self._directory}/core"

    @classmethod
    @contextlib.asynccontextmanager
    async def start(cls, settings: EngineSettings, child: CoreChild) -> AsyncIterator[Self]:
        """Tells the core what to load, and waits until it has. Raises Unavailable when it ends before that."""
        client = cls(settings, child)
        try:
            await client._load()
            yield client
        finally:
            await client._stop()

    @property
    def alive(self) -> bool:
        """False once the core process has ended."""
        return self._child.exit_code is None

    @property
    def silent_s(self) -> float:
        """Seconds since the core last told its figures. It does so every second, and after every longer step."""
        return time.monotonic() - self._stats_at

    async def ended(self) -> int:
        """Waits for the core process to end; its exit code."""
        return await self._child.ended()

    @property
    def num_open(self) -> int:
        """Requests that have not had their last delta."""
        return len(self._mailboxes)

    async def generate(self, request: Request) -> AsyncIterator[Delta]:
        """Deltas of one request, the last with a finish reason. Closing the iterator early (client gone) aborts it in
        the core. Raises Overloaded when the bounded queue is full, InvalidRequest when it can never fit, Unavailable
        when the core has died, DeadlineExceeded after `request_timeout` seconds."""
        self._admit(request)
        mailbox = self._mailboxes[request.id] = Mailbox()
        deadline = self._loop.call_later(self._settings.request_timeout, mailbox.expire)  # one timer for all deltas
        try:
            self._send(Submit(request))
            while request.id in self._mailboxes:
                delta = await self._next(mailbox)
                if delta.finish_reason is not None:
                    del self._mailboxes[request.id]
                yield delta
        finally:
            deadline.cancel()
            if self._mailboxes.pop(request.id, None) is not None and self.alive:
                self._send(Abort(request.id))

    def fail_open_requests(self, message: str) -> None:
        """Ends every open request with an error (503), so that none ends in silence."""
        for request_id, mailbox in self._mailboxes.items():
            mailbox.put(Delta(request_id=request_id, finish_reason=FinishReason.ERROR, error=message, error_status=503))

    async def _next(self, mailbox: Mailbox) -> Delta:
        try:
            return await mailbox.get()
        except TimeoutError as error:
            limit = f"{self._settings.request_timeout:g} s"
            raise DeadlineExceeded(f"the request was not done within {limit}") from error

    async def call(self, command: LinkCommand) -> bytes:
        """msgpack of the reply's value. Raises the TandemError that the core answered, or DeadlineExceeded."""
        self._check_alive()
        self._next_call += 1
        call_id = self._next_call
        future = self._calls[call_id] = self._loop.create_future()
        try:
            self._send(Call(call_id, command))
            async with asyncio.timeout(CALL_TIMEOUT_S):
                reply = await future
        except TimeoutError as error:
            raise DeadlineExceeded(f"the engine core did not answer within {CALL_TIMEOUT_S:g} s") from error
        finally:
            del self._calls[call_id]
        if reply.error is not None:
            raise error_of(reply.status, reply.error)
        return bytes(reply.value)

    def _admit(self, request: Request) -> None:
        self._check_alive()
        length = len(request.prompt)
        if length >= self.model.max_model_len:
            raise InvalidRequest(
                f"the prompt has {length} tokens; this engine holds {self.model.max_model_len} of prompt and answer"
            )
        if len(self._mailboxes) >= self._settings.max_queue + self._settings.max_num_seqs:
            raise Overloaded(
                f"{len(self._mailboxes)} requests are running or waiting; try again later",
                retry_after_s=self._retry_after_s(),
            )
        assert request.id not in self._mailboxes, f"request id {request.id} is in use"

    def _retry_after_s(self) -> int:
        """When about half of what is waiting will be done, at the measured speed."""
        waiting = self.stats.waiting_tokens if self.stats is not None else 0
        return max(1, min(60, math.ceil(waiting / max(self._tokens_per_s, 1.0) / 2)))

    def _check_alive(self) -> None:
        if not self.alive:
            raise Unavailable(f"the engine core has died with exit code {self._child.exit_code}")

    async def _load(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._ready: asyncio.Future[None] = self._loop.create_future()
        self._watcher = asyncio.create_task(self._watch())
        self._socket.setsockopt(zmq.SNDHWM, MAX_QUEUED_MESSAGES)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind(self._address)
        self._child.tell(f"{self._address}\n".encode() + msgspec.json.encode(core_settings(self._settings)))
        self._loop.add_reader(self._socket, self._receive)
        try:
            async with asyncio.timeout(self._settings.startup_timeout):
                await self._ready
        except TimeoutError as error:
            raise Unavailable(f"the engine core was not ready within {self._settings.startup_timeout:g} s") from error

    async def _watch(self) -> None:
        """Nobody waits for a dead core."""
        code = await self._child.ended()
        message = f"the engine core ended with exit code {code}"
        if not self._ready.done():
            self._ready.set_exception(Unavailable(f"{message} before it was ready; its log says why"))
        self.fail_open_requests(message)
        for call_id, future in self._calls.items():
            if not future.done():
                future.set_result(Reply(call_id, error=message, status=503))

    def _send(self, message: ToCore) -> None:
        try:
            self._socket.send(_encode(message), zmq.NOBLOCK)
        except zmq.Again as error:
            raise Unavailable("the engine core does not read its queue") from error
        self._loop.call_soon(self._receive)  # sending may have consumed the edge that announces incoming messages

    def _receive(self) -> None:
        """Reads all there is: ZMQ's descriptor signals edges, not levels."""
        while not self._socket.closed and int(self._socket.get(zmq.EVENTS)) & zmq.POLLIN:
            self._handle(_decode(self._socket.recv(zmq.NOBLOCK)))

    def _handle(self, message: FromCore) -> None:
        match message:
            case Deltas(deltas):
                for delta in deltas:
                    mailbox = self._mailboxes.get(delta.request_id)
                    if mailbox is not None:
                        mailbox.put(delta)
            case Stats():
                self._measure(message)
            case Reply():
                future = self._calls.get(message.call_id)
                if future is not None and not future.done():
                    future.set_result(message)
            case Ready():
                self.model, self.incarnation = message.model, message.incarnation
                self.control_address = message.control_address
                self._stats_at = time.monotonic()
                if not self._ready.done():
                    self._ready.set_result(None)

    def _measure(self, stats: Stats) -> None:
        now = time.monotonic()
        if self.stats is not None and stats.num_running:
            done = stats.prompt_tokens + stats.output_tokens - self.stats.prompt_tokens - self.stats.output_tokens
            self._tokens_per_s = done / max(now - self._stats_at, 1e-3)
        self.stats, self._stats_at = stats, now

    async def _stop(self) -> None:
        """Ends the core, kindly and then not, and leaves nothing behind."""
        self._child.end()
        try:
            async with asyncio.timeout(STOP_TIMEOUT_S):
                await self._child.ended()
        except TimeoutError:
            self._child.kill()
            await self._child.ended()
        await self._watcher
        self._loop.remove_reader(self._socket)
        self._socket.close(linger=0)
        self._context.term()
        shutil.rmtree(self._directory, ignore_errors=True)
