"""What decode needs to pull for one sequence: the state of a hand-off on the reader's side."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from engine.core import Sequence, Take
from kvtransfer.layout import Copies, KVLayout
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

    def restart(self, message: Ready | Done) -> None:
        """A new lease announces its blocks from the first one on."""
        self.epoch, self.epoch_slot = message.epoch, message.epoch_slot
        self.blocks, self.num_announced, self.pulling = [], 0, 0
        self.num_pulled = self.sequence.num_computed

    def announce(self, message: Ready | Done) -> bool:
        """More blocks are readable. False when the message cannot be true; the hand-off is then of no use."""
        length, layout = self.sequence.prompt_length, self.source.layout
        complete = message.num_computed == length if isinstance(message, Done) else message.num_computed <= length
        self.blocks += message.blocks
        covered = len(self.blocks) * layout.block_size
        plausible = self.num_announced <= message.num_computed <= covered < length + layout.block_size
        self.num_announced = message.num_computed
        return complete and plausible


@dataclass(slots=True)
class TransferCounters:
    tokens: int = 0
    num_bytes: int = 0
    recomputed_tokens: int = 0
    exposed_seconds: float = 0.0  # from Done to RUNNING: the part of the transfer that prefill did not hide
    pull_seconds: float = 0.0  # all time spent copying
