"""The engine core as a process: the sockets around an Engine, and the one loop that drives it.

API process ══ PAIR ══╗                      ╔══ ROUTER ══ readers of our pool
                      ╠═▶ poll ─▶ step ─▶ tell
transports' events ═══╝                      ╚══ DEALER ══ owners of the pools we read
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import secrets
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec
import zmq

from engine.api.errors import TandemError
from engine.assembly import Assembly, assemble
from engine.messages import (
    MAX_QUEUED_MESSAGES,
    Abort,
    Call,
    Connect,
    CoreSettings,
    Deltas,
    Disconnect,
    Free,
    FromCore,
    Initialize,
    Ready,
    Reply,
    Stats,
    Submit,
    ToCore,
)
from engine.observe import log as logs
from kvtransfer import protocol
from kvtransfer.transfer import Connected, ConnectionLost, Event, Pulled, PullFailed, ReaderLost

logger = logging.getLogger("engine.process")  # this module is run as __main__

IDLE_MS = 100  # how stale a deadline may get while nothing happens
STATS_SECONDS = 1.0
TICK_SECONDS = 0.05  # between two looks at deadlines, which are seconds away
MAX_MESSAGES_A_TURN = 1000  # read from one socket before the next step

_encode = msgspec.msgpack.Encoder().encode
_decode_api = msgspec.msgpack.Decoder(ToCore).decode
_decode_reader = msgspec.msgpack.Decoder(protocol.FromReader).decode
_decode_owner = msgspec.msgpack.Decoder(protocol.FromOwner).decode


class CoreProcess:
    """Turns messages into calls on the engine, and what the engine has to say into messages."""

    def __init__(self, parts: Assembly, api: zmq.Socket[bytes], incarnation: str) -> None:
        self._parts = parts
        self._engine = parts.engine
        self._links = parts.links
        self._api = api
        self._incarnation = incarnation
        self._stopping = False
        self._stats_at = 0.0
        self._reported: Stats | None = None
        self._by_descriptor = {endpoint.fileno(): endpoint for endpoint in parts.endpoints.values()}
        self._controls: dict[zmq.Socket[bytes], str] = {}
        self._poller = self._poller_of(())
        self._ticked_at = 0.0

    def run(self) -> None:
        """Until `stop`."""
        self._tell(Ready(self._parts.model, self._links.control_address, self._incarnation))
        while not self._stopping:
            busy = self._engine.step()
            self._flush()
            self._poll(0 if busy else IDLE_MS)
            self._tick(busy)

    def stop(self) -> None:
        self._stopping = True

    def _tell(self, message: FromCore) -> None:
        self._api.send(_encode(message), zmq.NOBLOCK)  # raises when the API process is lost

    def _flush(self) -> None:
        deltas = self._engine.deltas()
        if deltas:
            self._tell(Deltas(deltas))

    def _poll(self, timeout_ms: int) -> None:
        controls = dict(self._links.controls())
        if controls != self._controls:
            self._controls, self._poller = controls, self._poller_of(controls)
        for ready, _ in self._poller.poll(timeout_ms):
            self._read(ready)

    def _poller_of(self, controls: Iterable[zmq.Socket[bytes]]) -> zmq.Poller:
        """Kept from step to step: links come and go rarely."""
        poller = zmq.Poller()
        for ready in (self._api, self._links.router, *self._by_descriptor, *controls):
            poller.register(ready, zmq.POLLIN)
        return poller

    def _read(self, ready: zmq.Socket[bytes] | int) -> None:
        if isinstance(ready, int):
            for event in self._by_descriptor[ready].poll():
                self._on_event(event)
        elif ready is self._api:
            for frames in _messages(ready):
                self._on_api(_decode_api(frames[0]))
        elif ready is self._links.router:
            for frames in _messages(ready):
                self._on_reader(frames)
        elif not ready.closed:
            for frames in _messages(ready):
                self._on_owner(self._controls[ready], frames)

    def _on_api(self, message: ToCore) -> None:
        match message:
            case Submit(request):
                self._engine.submit(request)
            case Abort(request_id):
                self._engine.abort(request_id)
            case Call():
                self._answer(message)

    def _answer(self, call: Call) -> None:
        try:
            match call.command:
                case Initialize(peer, me):
                    self._reply(call.call_id, self._links.initialize(peer, me))
                case Connect(peer, control_address, endpoint_info):
                    self._links.connect(peer, control_address, endpoint_info, lambda to: self._reply(call.call_id, to))
                case Disconnect(peer):
                    self._links.disconnect(peer)
                    self._engine.giving.reader_lost(peer)
                    self._reply(call.call_id, None)
                case Free(peer, session):
                    self._engine.giving.free_session(session)
                    self._engine.taking.free_session(peer, session)
                    self._reply(call.call_id, None)
        except TandemError as error:
            self._reply(call.call_id, error)

    def _reply(self, call_id: int, outcome: object) -> None:
        if isinstance(outcome, TandemError):
            self._tell(Reply(call_id, error=outcome.message, status=outcome.status))
        else:
            self._tell(Reply(call_id, _encode(outcome)))

    def _on_reader(self, frames: list[bytes]) -> None:
        """From the control channel's open side: whatever comes, the loop lives on."""
        reader = self._links.reader_of(frames[0])
        if reader is None or len(frames) != 2:
            logger.warning("dropped a control message from a stranger")
            return
        try:
            message = _decode_reader(frames[1])
        except protocol.MALFORMED as error:
            logger.warning("dropped a malformed control message from %s: %s", reader, error)
            return
        match message:
            case protocol.Want():
                self._engine.giving.want(reader, message)
            case protocol.Release():
                self._engine.giving.release(reader, message)
            case protocol.Renew():
                self._engine.giving.renew(reader, message)

    def _on_owner(self, owner: str, frames: list[bytes]) -> None:
        try:
            message = _decode_owner(frames[-1])
        except protocol.MALFORMED as error:
            logger.warning("dropped a malformed control message from %s: %s", owner, error)
            return
        self._engine.taking.told(owner, message)

    def _on_event(self, event: Event) -> None:
        match event:
            case Pulled():
                self._engine.taking.pulled(event)
            case PullFailed():
                self._engine.taking.pull_failed(event)
            case Connected(connection, gigabytes_per_s):
                self._links.established(connection, gigabytes_per_s)
            case ConnectionLost(connection, reason):
                self._links.lost(connection, reason)
            case ReaderLost(peer_id):
                self._engine.giving.reader_lost(peer_id)

    def _tick(self, busy: bool) -> None:
        now = time.monotonic()
        if now - self._ticked_at >= TICK_SECONDS:
            self._ticked_at = now
            self._engine.giving.tick()
            self._engine.taking.tick()
            self._links.tick()
        overdue = now - self._stats_at >= STATS_SECONDS
        if overdue or not busy:
            self._report(overdue)

    def _report(self, overdue: bool) -> None:
        """Its figures: about once a second while there is work, and those of an idle engine are true at once."""
        stats = self._stats()
        if overdue or stats != self._reported:
            self._engine.check_integrity()
            self._reported, self._stats_at = stats, time.monotonic()
            self._tell(stats)

    def _stats(self) -> Stats:
        engine, scheduler, counters = self._engine, self._engine.scheduler, self._engine.taking.counters
        return Stats(
            num_waiting=len(scheduler.waiting),
            waiting_tokens=sum(sequence.num_missing for sequence in scheduler.waiting + scheduler.running),
            num_running=len(scheduler.running),
            num_handoff=len(engine.giving) + len(engine.taking),
            blocks_free=scheduler.pool.num_free,
            blocks_total=scheduler.pool.num_blocks,
            steps=engine.steps,
            prompt_tokens=engine.requests.prompt_tokens,
            output_tokens=engine.requests.output_tokens,
            cached_tokens=engine.requests.cached_tokens,
            draft_tokens=scheduler.drafter.num_drafted,
            accepted_tokens=scheduler.drafter.num_accepted,
            preemptions=scheduler.preemptions,
            transferred_tokens=counters.tokens,
            recomputed_tokens=counters.recomputed_tokens,
            local_tokens=counters.local_tokens,
            transferred_bytes=counters.num_bytes,
            pull_seconds=counters.pull_seconds,
            exposed_seconds=counters.exposed_seconds,
            links=self._links.stats(),
        )


def dial_api(context: zmq.Context[zmq.Socket[bytes]], address: str) -> zmq.Socket[bytes]:
    """Towards the API process, which may be busy for a while: what it is told waits."""
    api = context.socket(zmq.PAIR)
    api.setsockopt(zmq.SNDHWM, MAX_QUEUED_MESSAGES)
    api.setsockopt(zmq.LINGER, 500)
    api.connect(address)
    return api


def _messages(socket: zmq.Socket[bytes]) -> Iterator[list[bytes]]:
    """What has arrived, up to a bound."""
    for _ in range(MAX_MESSAGES_A_TURN):
        try:
            yield socket.recv_multipart(zmq.NOBLOCK)
        except zmq.ZMQError:  # nothing more, or closed by the last message
            return


def main() -> None:
    """`python -m engine.process`, with the API process's address and CoreSettings as JSON, a line each, on standard
    input. Whoever starts it binds its life to theirs: see `engine.child`."""
    address, _, said = sys.stdin.read().partition("\n")
    if not said:
        sys.exit(1)  # our parent has ended before it knew what we should do
    settings = msgspec.json.decode(said, type=CoreSettings)
    logs.configure(settings.log_level)
    logger.debug("told what to load")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    _keep_threads_quiet(settings.num_threads)
    with contextlib.ExitStack() as stack:
        stack.callback(_remove_orphan, Path(address.removeprefix("ipc://")).parent)
        context = stack.enter_context(zmq.Context())
        api = stack.enter_context(dial_api(context, address))
        incarnation = secrets.token_hex(8)
        try:
            parts = assemble(settings, context, incarnation)
        except (ValueError, MemoryError, OSError) as error:
            logger.error("cannot start: %s", error)
            sys.exit(1)
        stack.callback(parts.close)
        process = CoreProcess(parts, api, incarnation)
        gc.freeze()  # as in the API process: no step waits while what is loaded is looked through for garbage
        signal.signal(signal.SIGTERM, lambda *_: process.stop())
        process.run()


def _keep_threads_quiet(num_threads: int | None) -> None:
    """Torch reads these when it is imported. Threads that wait by spinning would starve another engine's."""
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    if num_threads:
        os.environ["OMP_NUM_THREADS"] = str(num_threads)


def _remove_orphan(directory: Path) -> None:
    """When the API process was killed, nobody else removes its directory."""
    if os.getppid() == 1:
        for file in directory.glob("*"):
            file.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            directory.rmdir()


if __name__ == "__main__":
    main()
