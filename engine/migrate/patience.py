"""When decode had better read a prompt itself than wait for a prefill engine that is behind."""

from __future__ import annotations

from collections.abc import Collection

from engine.migrate.handoff import Handoff, take_of
from engine.pace import follow
from engine.scheduler import Scheduler

MARGIN = 1.5  # by which to be sooner here: streams pay for it


class Patience:
    """Follows how long each prefill engine takes for a token of ours."""

    def __init__(self) -> None:
        self._done_at: dict[str, float] = {}
        self._per_token_s: dict[str, float] = {}

    def observe(self, handoff: Handoff, now: float) -> None:
        """A prompt is done: its engine had it since it was asked, or since the one before was done."""
        peer = handoff.peer
        computed = max(handoff.sequence.prompt_length - handoff.sequence.num_computed, 1)
        seconds = (now - max(handoff.asked_at, self._done_at.get(peer, 0.0))) / computed
        self._per_token_s[peer] = follow(self._per_token_s.get(peer, 0.0), seconds)
        self._done_at[peer] = now

    def forget(self, peer: str) -> None:
        """It is gone; another life of it may be faster."""
        self._done_at.pop(peer, None)
        self._per_token_s.pop(peer, None)

    def overdue(self, handoffs: Collection[Handoff], scheduler: Scheduler) -> Handoff | None:
        """The hand-off to take back, in the order in which they were asked for: the youngest, when its engine has said
        nothing of it yet, and so much of ours to do before it that it would be done here far sooner. One at a time,
        beside no other prompt."""
        if not handoffs or scheduler.is_catching_up:
            return None
        *older, youngest = handoffs
        is_computed = take_of(youngest.sequence).first_token is not None
        if is_computed or youngest.begun or youngest.peer not in self._per_token_s:
            return None
        ahead = sum(each.num_unannounced for each in older if each.peer == youngest.peer)
        there_s = (ahead + youngest.num_unannounced) * self._per_token_s[youngest.peer]
        here_s = scheduler.seconds_to_catch_up(youngest.num_unannounced)
        return youngest if there_s > MARGIN * here_s else None
