"""What decode needs to pull for one sequence: the state of a hand-off on the reader's side."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from engine.core import Sequence, Take
from kvtransfer import epochs
from kvtransfer.copies import Copies
from kvtransfer.layout import KVLayout
from kvtransfer.protocol import Done, FromReader, Key, Ready


def take_of(sequence: Sequence) -> Take:
    take = sequence.request.handoff
    assert isinstance(take, Take), "not a request to take"
    return take


class Source(Protocol):
    """An engine whose pool we read: one link, `connected` or being connected again."""

    @property
    def connected(self) -> bool: ...

    @property
    def incarnation(self) -> str: ...

    @property
    def layout(self) -> KVLayout: ...

    def send(self, message: FromReader) -> bool: ...

    def pull(self, transfer_id: int, copies: Copies, deadline_s: float) -> None: ...


SourceOf = Callable[[str], "Source | None"]


@dataclass(slots=True, eq=False)
class Handoff:
    """What decode needs to pull for one sequence, and how far it is.

    tokens   0 ── sequence.num_computed ─── num_pulled ─── num_announced ─── prompt_length
                 found in our own cache
    """

    sequence: Sequence
    key: Key
    peer: str
    source: Source
    slot: int  # our own word to read the owner's epoch word into
    asked_at: float  # when it was asked for
    deadline: float  # of the next sign of life
    epoch: int = 0
    epoch_slot: int = 0
    blocks: list[int] = field(default_factory=list)  # the owner's, from token 0
    num_announced: int = 0
    num_pulled: int = 0
    pulling: int = 0  # tokens in the pull under way
    transfer_id: int | None = None
    done: bool = False
    verifying: bool = False
    failure: str | None = None
    abandoned: bool = False  # nobody wants the sequence any more: free its blocks when the pull has drained
    done_at: float = 0.0  # when Done came

    @property
    def begun(self) -> bool:
        """Whether the owner has told anything of it, or nobody will hear of it any more."""
        return self.done or self.abandoned or self.failure is not None or self.epoch > 0

    @property
    def num_unannounced(self) -> int:
        """Tokens that the owner has yet to compute, as far as we know."""
        return self.sequence.prompt_length - max(self.num_announced, self.sequence.num_computed)

    def restart(self, message: Ready | Done) -> None:
        """A new lease announces its blocks from the first one on."""
        self.epoch, self.epoch_slot = message.epoch, message.epoch_slot
        self.blocks, self.num_announced, self.pulling = [], 0, 0
        self.num_pulled = self.sequence.num_computed

    def announce(self, message: Ready | Done) -> None:
        """More blocks are readable. Raises ValueError, with nothing changed, when the message cannot be true."""
        length, layout, now = self.sequence.prompt_length, self.source.layout, message.num_computed
        covered = (len(self.blocks) + len(message.blocks)) * layout.block_size
        if not self.num_announced <= now <= min(covered, length) or covered >= length + layout.block_size:
            raise ValueError(f"{now} tokens in blocks for {covered}, {self.num_announced} and a prompt of {length}")
        if isinstance(message, Done) and (now < length or not 0 <= message.num_cached <= length):
            raise ValueError(f"done at {now} of {length} tokens, {message.num_cached} of them cached")
        if any(not 0 <= block < layout.num_blocks for block in message.blocks):
            raise ValueError(f"a block outside its pool of {layout.num_blocks}")
        if message.epoch < 1 or not 0 <= message.epoch_slot < epochs.OWNER_WORDS:
            raise ValueError(f"epoch {message.epoch} in slot {message.epoch_slot}")
        self.blocks += message.blocks
        self.num_announced = now


@dataclass(slots=True)
class TransferCounters:
    tokens: int = 0
    num_bytes: int = 0
    recomputed_tokens: int = 0
    local_tokens: int = 0  # of prompts too short to be worth a hand-off, or that prefill was too far behind for
    exposed_seconds: float = 0.0  # from Done to RUNNING: the part of the transfer that prefill did not hide
    pull_seconds: float = 0.0  # all time spent copying
