"""The owner's side of hand-offs: compute a prompt, announce its blocks as they fill, hold them until they are read.

    request and Want have both come ─▶ grant a lease, WAITING ─▶ Ready … Ready ─▶ Done, HELD ─▶ Release ─▶ freed

Whichever of the two comes first waits for the other, with a deadline: no prompt is computed before decode has room for
it. In LMDeploy's order nobody has asked yet: the prompt is computed at once and the lease begins when it is done.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from engine.api.errors import Declined
from engine.cache.leases import Lease, LeaseTable
from engine.core import Give, Sequence, Status, TokenLogprobs
from engine.requests import Requests
from engine.scheduler import Scheduler
from kvtransfer.protocol import Done, Fail, FromOwner, Key, Ready, Release, Renew, Want

DECLINED = "decode computes this prompt itself"
NO_LEASE = "too many hand-offs are open on this engine; try again later"
MAX_EARLY = 4096  # readers' words that came before their request

Send = Callable[[str, FromOwner], bool]  # (reader's engine id, message) -> False when the reader cannot be reached


@dataclass(frozen=True, slots=True)
class Expected:
    """A request whose reader has not asked yet."""

    sequence: Sequence
    deadline: float


@dataclass(frozen=True, slots=True)
class Early:
    """What a reader said before the request came: that it wants the hand-off, or that it does not."""

    reader: str
    wanted: bool
    deadline: float


def key_of(sequence: Sequence) -> Key:
    give = sequence.request.handoff
    assert isinstance(give, Give), "not a request to give"
    return Key(give.session, give.index)


class Giving:
    """All hand-offs this engine owes. What decode did is told as 409, 410 or 503, which no proxy counts against us."""

    def __init__(
        self,
        scheduler: Scheduler,
        requests: Requests,
        leases: LeaseTable,
        send: Send,
        incarnation: str,
        timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._scheduler = scheduler
        self._requests = requests
        self._leases = leases
        self._send = send
        self._incarnation = incarnation
        self._timeout_s = timeout_s
        self._clock = clock
        self._expected: dict[Key, Expected] = {}
        self._early: dict[Key, Early] = {}

    def __len__(self) -> int:
        return len(self._expected) + len(self._leases)

    def held(self) -> list[Sequence]:
        """Sequences whose blocks only a lease holds."""
        return [lease.sequence for lease in self._leases if lease.sequence.status is Status.HELD]

    def expect(self, sequence: Sequence) -> None:
        """A request to give has come."""
        give, key = sequence.request.handoff, key_of(sequence)
        assert isinstance(give, Give)
        sequence.status = Status.EXPECTED
        early = self._early.pop(key, None)
        if key in self._expected or self._leases.get(key) is not None:
            self._refuse(sequence, f"session {key.session} is already in use on this engine; draw a new one", 409)
        elif give.peer is None:
            self._compute(sequence)
        elif early is not None and early.reader == give.peer:
            if early.wanted:
                self._start(sequence, early.reader)
            else:
                self._refuse(sequence, DECLINED, Declined.status)
        else:
            self._expected[key] = Expected(sequence, self._clock() + self._timeout_s)

    def want(self, reader: str, want: Want) -> None:
        """A reader has its blocks reserved. May be asked again after a lost connection."""
        lease, expected = self._leases.get(want.key), self._expected.get(want.key)
        if want.incarnation != self._incarnation:
            self._send(reader, Fail(want.key, "this engine has restarted since; connect again", unknown=True))
        elif lease is not None and lease.reader in (None, reader):
            self._bind(lease, reader)
        elif expected is not None and self._addressed_to(expected.sequence, reader):
            del self._expected[want.key]
            self._start(expected.sequence, reader)
        elif lease or expected or not want.promised or not self._note_early(reader, want.key, wanted=True):
            self._send(reader, Fail(want.key, f"session {want.key.session} is not held for {reader}", unknown=True))

    def progress(self, sequence: Sequence) -> None:
        """After a step: announces the blocks that it filled."""
        lease = self._leases.get(key_of(sequence))
        if lease is not None and lease.reader is not None:
            self._announce(lease)

    def done(self, sequence: Sequence, token: int, logprobs: TokenLogprobs | None) -> None:
        """The prompt is computed and its first token sampled: RUNNING ─▶ HELD."""
        key = key_of(sequence)
        if self._leases.get(key) is None and self._leases.full:
            self._refuse(sequence, NO_LEASE, 429)
            return
        self._scheduler.hold(sequence)
        self._requests.hold(sequence, token, logprobs)
        lease = self._leases.get(key) or self._leases.grant(key, sequence, None)
        lease.first_logprobs = msgspec.msgpack.encode(logprobs) if logprobs is not None else b""
        if lease.reader is not None:
            self._announce_done(lease)

    def release(self, reader: str, release: Release) -> None:
        """The reader has read, or does not want to any more."""
        lease, expected = self._leases.get(release.key), self._expected.get(release.key)
        if lease is not None and lease.reader == reader:
            if lease.num_announced:
                self._end(lease, "decode gave the hand-off up", 409)
            else:
                self._end(lease, DECLINED, Declined.status)
        elif expected is not None and self._addressed_to(expected.sequence, reader):
            del self._expected[release.key]
            self._refuse(expected.sequence, DECLINED, Declined.status)
        elif lease is None and expected is None:
            self._note_early(reader, release.key, wanted=False)

    def _note_early(self, reader: str, key: Key, wanted: bool) -> bool:
        """False when there is no room to remember it, or another reader spoke first."""
        early = self._early.get(key)
        if len(self._early) >= MAX_EARLY or (early is not None and early.reader != reader):
            return False
        self._early[key] = Early(reader, wanted, self._clock() + self._timeout_s)
        return True

    def renew(self, reader: str, renew: Renew) -> None:
        for key in renew.keys:
            lease = self._leases.get(key)
            if lease is not None and lease.reader == reader:
                self._leases.renew(lease)

    def free_session(self, session: int) -> None:
        """free_cache: ends every lease of the session. Idempotent."""
        for lease in self._leases.of_session(session):
            self._end(lease, "the hand-off was freed", 409)

    def cancel(self, sequence: Sequence) -> None:
        """The client went away before the prompt was done."""
        key = key_of(sequence)
        lease = self._leases.get(key)
        self._expected.pop(key, None)
        if lease is None:
            self._scheduler.remove(sequence)
            return
        if lease.reader is not None:
            self._send(lease.reader, Fail(key, "the request was cancelled on the prefill engine"))
        self._end(lease, "cancelled", 409)

    def reader_lost(self, reader: str) -> None:
        """The reader died or was disconnected: nobody will read what is held for it."""
        reason = f"the decode engine {reader} is gone"
        for lease in self._leases.of_reader(reader):
            self._end(lease, reason, 503)
        for key, expected in list(self._expected.items()):
            if self._addressed_to(expected.sequence, reader):
                del self._expected[key]
                self._refuse(expected.sequence, reason, 503)
        self._early = {key: early for key, early in self._early.items() if early.reader != reader}

    def tick(self) -> None:
        """Ends what has waited too long."""
        now = self._clock()
        for lease in self._leases.expired():
            self._end(lease, "decode stopped renewing its lease", 503)
        for key, expected in list(self._expected.items()):
            if expected.deadline <= now:
                del self._expected[key]
                self._refuse(expected.sequence, "decode had no room for this request in time", 503)
        for key, early in list(self._early.items()):
            if early.deadline <= now:
                del self._early[key]
                if early.wanted:
                    self._send(early.reader, Fail(key, "the prefill engine never received this request"))

    def _compute(self, sequence: Sequence) -> None:
        sequence.status = Status.WAITING
        self._scheduler.add(sequence)

    def _start(self, sequence: Sequence, reader: str) -> None:
        key = key_of(sequence)
        if self._leases.full:
            self._send(reader, Fail(key, "the prefill engine has no lease left"))
            self._refuse(sequence, NO_LEASE, 429)
            return
        self._leases.grant(key, sequence, reader)
        self._compute(sequence)

    def _bind(self, lease: Lease, reader: str) -> None:
        """The lease is this reader's; what is computed is announced from the first block on."""
        lease.reader, lease.num_announced = reader, 0
        self._leases.renew(lease)
        if lease.sequence.status is Status.HELD:
            self._announce_done(lease)
        else:
            self._announce(lease)

    def _announce(self, lease: Lease) -> None:
        """Full blocks only: a block that is still being filled would have to be read twice."""
        sequence = lease.sequence
        full = sequence.num_computed // self._scheduler.pool.block_size
        blocks = sequence.block_table[lease.num_announced : full]
        if not blocks:
            return
        lease.num_announced = full
        num_computed = full * self._scheduler.pool.block_size
        self._tell(lease, Ready(lease.key, lease.epoch, lease.slot, blocks, num_computed))

    def _announce_done(self, lease: Lease) -> None:
        sequence = lease.sequence
        blocks = sequence.block_table[lease.num_announced :]
        lease.num_announced = len(sequence.block_table)
        first_token = sequence.tokens[sequence.prompt_length]
        self._tell(
            lease,
            Done(
                lease.key,
                lease.epoch,
                lease.slot,
                blocks,
                sequence.prompt_length,
                first_token,
                lease.first_logprobs,
                sequence.num_cached,
            ),
        )

    def _tell(self, lease: Lease, message: FromOwner) -> None:
        assert lease.reader is not None
        if not self._send(lease.reader, message):
            self._end(lease, f"the decode engine {lease.reader} cannot be reached", 503)

    def _end(self, lease: Lease, reason: str, status: int) -> None:
        """The epoch word is cleared before the blocks are free."""
        self._leases.end(lease.key)
        self._refuse(lease.sequence, reason, status)

    def _refuse(self, sequence: Sequence, reason: str, status: int) -> None:
        self._requests.fail(sequence, reason, status)
        self._scheduler.remove(sequence)

    @staticmethod
    def _addressed_to(sequence: Sequence, reader: str) -> bool:
        give = sequence.request.handoff
        return isinstance(give, Give) and give.peer == reader
