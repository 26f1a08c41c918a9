"""The reader's side of hand-offs: pull a prompt's blocks while they are computed elsewhere, believe them, go on.

    RESERVING ─▶ PULLING: Want ─▶ (Ready ─▶ pull)* ─▶ Done ─▶ pull ─▶ read the epoch word ─▶ RUNNING, Release
                     └─ any failure ─▶ RUNNING with nothing computed: decode reads the prompt itself
    few tokens to compute ─▶ Release, WAITING: decode reads the prompt itself, in a step that runs anyway
    prefill far behind ─▶ Release, RUNNING with nothing computed: decode reads the prompt itself, a little each step

The first token travels in Done and goes to the client at once; only the tokens after it wait for the last pull. A pull
in flight owns the sequence's blocks: whatever happens, they are reused only after its Pulled or PullFailed has come.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import msgspec
import numpy as np

from engine.core import Sequence, Status, Take, TokenLogprobs
from engine.migrate.handoff import Handoff, Source, SourceOf, TransferCounters, take_of
from engine.migrate.patience import Patience
from engine.requests import Requests
from engine.scheduler import Scheduler
from kvtransfer import epochs
from kvtransfer.copies import Copies
from kvtransfer.layout import KVLayout
from kvtransfer.plan import plan
from kvtransfer.protocol import MALFORMED, Done, Fail, Key, Ready, Release, Renew, Want
from kvtransfer.transfer import Pulled, PullFailed

logger = logging.getLogger(__name__)

_decode_logprobs = msgspec.msgpack.Decoder(TokenLogprobs).decode


class Taking:
    """All hand-offs this engine is owed."""

    def __init__(
        self,
        scheduler: Scheduler,
        requests: Requests,
        layout: KVLayout,
        words: memoryview,
        source_of: SourceOf,
        timeout_s: float,
        renew_s: float,
        local_tokens: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`words`: format 'q', the reader's words of kvtransfer/epochs.py. A prompt with at most `local_tokens` tokens
        that are not in our own prefix cache is computed here, and where this is not 0 also one that prefill is too far
        behind for."""
        self._scheduler = scheduler
        self._requests = requests
        self._layout = layout
        self._words = words
        self._source_of = source_of
        self._timeout_s = timeout_s
        self._renew_s = renew_s
        self._local_tokens = local_tokens
        self._clock = clock
        self._handoffs: dict[tuple[str, Key], Handoff] = {}
        self._transfers: dict[int, Handoff] = {}
        self._slots = list(range(len(words)))
        self._next_transfer = 0
        self._renew_at = 0.0
        self._patience = Patience()
        self.counters = TransferCounters()

    def __len__(self) -> int:
        return len(self._handoffs)

    def expect(self, sequence: Sequence) -> None:
        """A request to take has come: it queues for blocks, or goes on alone when there is nobody to pull from. A
        migration_request that names a stranger is refused; one that names a peer of ours that is gone is not, because
        LMDeploy's proxy does not notice a prefill engine's restart."""
        take, source = take_of(sequence), self._source_of(take_of(sequence).peer)
        sequence.status = Status.EXPECTED  # not the scheduler's yet
        if source is not None and source.connected:
            num_new = self._scheduler.num_uncached(sequence)
            if take.first_token is None and num_new <= self._local_tokens:
                self._decline(sequence, take, source, num_new)
            else:
                sequence.status = Status.RESERVING
                self._scheduler.add(sequence)
        elif source is None and take.first_token is not None:
            self._refuse(
                sequence, f"this engine is not connected to {take.peer}; POST /distserve/p2p_connect first", 400
            )
        else:
            self.counters.recomputed_tokens += sequence.prompt_length
            sequence.status = Status.WAITING
            self._scheduler.add(sequence)

    def _decline(self, sequence: Sequence, take: Take, source: Source, num_new: int) -> None:
        """So few tokens cost our streams less than a hand-off costs the request: prefill's queue, and the way here."""
        source.send(Release(Key(take.session, take.index)))
        self.counters.local_tokens += num_new
        sequence.status = Status.WAITING
        self._scheduler.add(sequence)

    def begin(self, sequence: Sequence) -> None:
        """Its blocks are reserved: ask for the hand-off."""
        take = take_of(sequence)
        key, source = Key(take.session, take.index), self._source_of(take.peer)
        if (take.peer, key) in self._handoffs:
            self._refuse(sequence, f"session {key.session} is already being taken; draw a new one", 409)
            return
        if source is None or not source.connected or not self._slots:
            self._recompute(sequence)
            return
        now = self._clock()
        handoff = Handoff(sequence, key, take.peer, source, self._slots.pop(), now, now + self._timeout_s)
        handoff.num_pulled = sequence.num_computed
        self._handoffs[take.peer, key] = handoff
        promised = take.first_token is None
        if not source.send(Want(key, source.incarnation, promised)):
            self._fail(handoff, f"{take.peer} cannot be reached")

    def cancel(self, sequence: Sequence) -> None:
        """The client went away while its blocks were being pulled."""
        take = take_of(sequence)
        handoff = self._handoffs.get((take.peer, Key(take.session, take.index)))
        assert handoff is not None, "a PULLING sequence has a hand-off"
        self._abandon(handoff)

    def told(self, peer: str, message: Ready | Done | Fail) -> None:
        """A message from the owner `peer`. One that fits nothing is late, and ignored."""
        handoff = self._handoffs.get((peer, message.key))
        if handoff is None or handoff.abandoned:
            return
        handoff.deadline = self._clock() + self._timeout_s
        match message:
            case Ready() | Done():
                self._announced(handoff, message)
            case Fail():
                self._refused(handoff, message)

    def pulled(self, event: Pulled) -> None:
        handoff = self._transfers.pop(event.transfer_id, None)
        if handoff is None:
            return
        handoff.transfer_id = None
        handoff.num_pulled += handoff.pulling
        handoff.pulling = 0
        handoff.deadline = self._clock() + self._timeout_s
        self.counters.num_bytes += event.num_bytes
        self.counters.pull_seconds += event.seconds
        self._continue(handoff)

    def pull_failed(self, event: PullFailed) -> None:
        handoff = self._transfers.pop(event.transfer_id, None)
        if handoff is not None:
            handoff.transfer_id = None
            self._fail(handoff, event.reason)

    def source_lost(self, peer: str, reason: str) -> None:
        """The owner died or was disconnected."""
        self._patience.forget(peer)
        for handoff in [handoff for handoff in self._handoffs.values() if handoff.peer == peer]:
            self._fail(handoff, reason)

    def free_session(self, peer: str, session: int) -> None:
        """free_cache at the reader: `peer` will not deliver this session. Idempotent."""
        for handoff in list(self._handoffs.values()):
            if handoff.peer == peer and handoff.key.session == session:
                self._fail(handoff, "the prefill was called off")

    def tick(self) -> None:
        """Fails what has been silent too long, takes back what is overdue, and renews the leases of the rest."""
        now = self._clock()
        for handoff in list(self._handoffs.values()):
            if handoff.deadline <= now and handoff.transfer_id is None:
                self._fail(handoff, f"no sign of the hand-off for {self._timeout_s:g} s")
        if self._local_tokens and (late := self._patience.overdue(self._handoffs.values(), self._scheduler)):
            self._take_back(late)
        if now >= self._renew_at:
            self._renew_at = now + self._renew_s
            self._renew()

    def _take_back(self, handoff: Handoff) -> None:
        self._end(handoff)
        self.counters.local_tokens += handoff.sequence.num_missing
        self._scheduler.resume(handoff.sequence, handoff.sequence.num_computed)

    def _renew(self) -> None:
        keys: dict[str, list[Key]] = {}
        for handoff in self._handoffs.values():
            keys.setdefault(handoff.peer, []).append(handoff.key)
        for peer, peers_keys in keys.items():
            source = self._source_of(peer)
            if source is not None:
                source.send(Renew(peers_keys))

    def _announced(self, handoff: Handoff, message: Ready | Done) -> None:
        if handoff.epoch != message.epoch:
            handoff.restart(message)
        try:
            handoff.announce(message)
            if isinstance(message, Done) and not handoff.done:
                self._first_token(handoff, message, _logprobs_of(message))
        except ValueError as error:
            self._fail(handoff, f"{handoff.peer} announced what cannot be: {error}")
            return
        if not handoff.abandoned:
            self._continue(handoff)

    def _first_token(self, handoff: Handoff, message: Done, logprobs: TokenLogprobs | None) -> None:
        """Tells the client at once; the sequence may end here (EOS, max_tokens 1), and then needs no KV at all. Raises
        ValueError, with nothing told, for a token that the request cannot be answered with."""
        sequence, known = handoff.sequence, take_of(handoff.sequence).first_token
        self._requests.check(sequence, message.first_token, logprobs)
        if known is not None and known != message.first_token:
            self._reject(handoff, f"migration_request names first token {known}, the prefill's is another")
            return
        handoff.done, handoff.done_at = True, self._clock()
        if known is None:
            self._patience.observe(handoff, handoff.done_at)
        sequence.num_cached = message.num_cached
        if self._requests.append(sequence, message.first_token, logprobs):
            self._abandon(handoff)

    def _refused(self, handoff: Handoff, message: Fail) -> None:
        if message.unknown and take_of(handoff.sequence).first_token is not None:
            self._reject(handoff, f"migration_request is stale or forged: {message.reason}")
        else:
            self._fail(handoff, message.reason)

    def _continue(self, handoff: Handoff) -> None:
        """One thing at a time: drain, then pull what is announced, then read the epoch word, then believe."""
        if handoff.transfer_id is not None:
            return
        if handoff.abandoned or handoff.failure is not None:
            self._settle(handoff)
        elif handoff.verifying:
            self._believe(handoff)
        elif handoff.num_announced > handoff.num_pulled:
            self._pull_announced(handoff)
        elif handoff.done:
            handoff.verifying = True
            self._pull(handoff, self._epoch_copy(handoff))

    def _pull_announced(self, handoff: Handoff) -> None:
        first, count = handoff.num_pulled, handoff.num_announced - handoff.num_pulled
        table = handoff.sequence.block_table
        try:
            copies = plan(handoff.source.layout, self._layout, handoff.blocks, table, first, count)
        except ValueError as error:
            self._fail(handoff, str(error))
            return
        handoff.pulling = count
        self._pull(handoff, copies)

    def _epoch_copy(self, handoff: Handoff) -> Copies:
        self._words[handoff.slot] = 0
        source = epochs.owner_offset(handoff.source.layout, handoff.epoch_slot)
        destination = epochs.reader_offset(self._layout, handoff.slot)
        return np.array([[source, destination, epochs.WORD_BYTES]], dtype=np.int64)

    def _pull(self, handoff: Handoff, copies: Copies) -> None:
        self._next_transfer += 1
        try:
            handoff.source.pull(self._next_transfer, copies, self._timeout_s)
        except ValueError as error:
            self._fail(handoff, str(error))
            return
        handoff.transfer_id = self._next_transfer
        self._transfers[self._next_transfer] = handoff

    def _believe(self, handoff: Handoff) -> None:
        if self._words[handoff.slot] != handoff.epoch:
            self._fail(handoff, "the lease ended before the last read")
            return
        self.counters.tokens += handoff.sequence.prompt_length - handoff.sequence.num_computed
        self.counters.exposed_seconds += self._clock() - handoff.done_at
        self._end(handoff)
        self._scheduler.resume(handoff.sequence, handoff.sequence.prompt_length)

    def _fail(self, handoff: Handoff, reason: str) -> None:
        """Decode computes the prompt itself, as soon as no pull writes into its blocks any more."""
        handoff.failure = reason
        self._settle(handoff)

    def _reject(self, handoff: Handoff, reason: str) -> None:
        self._requests.fail(handoff.sequence, reason, 400)
        self._abandon(handoff)

    def _abandon(self, handoff: Handoff) -> None:
        handoff.abandoned = True
        self._settle(handoff)

    def _settle(self, handoff: Handoff) -> None:
        if handoff.transfer_id is not None:
            return
        self._end(handoff)
        if handoff.abandoned:
            self._scheduler.remove(handoff.sequence)
        else:
            logger.warning("recomputing a prompt of %d tokens: %s", handoff.sequence.prompt_length, handoff.failure)
            self._recompute(handoff.sequence)

    def _end(self, handoff: Handoff) -> None:
        """The hand-off is over on both sides."""
        if self._handoffs.pop((handoff.peer, handoff.key), None) is None:
            return
        self._slots.append(handoff.slot)
        handoff.source.send(Release(handoff.key))

    def _recompute(self, sequence: Sequence) -> None:
        self.counters.recomputed_tokens += sequence.prompt_length - sequence.num_computed
        self._scheduler.resume(sequence, sequence.num_computed)

    def _refuse(self, sequence: Sequence, reason: str, status: int) -> None:
        self._requests.fail(sequence, reason, status)
        self._scheduler.remove(sequence)


def _logprobs_of(message: Done) -> TokenLogprobs | None:
    """Of the first token. Raises ValueError for bytes that hold none."""
    try:
        return _decode_logprobs(message.logprobs) if message.logprobs else None
    except MALFORMED as error:
        raise ValueError(f"log-probabilities that cannot be read: {error}") from error
