"""One sub-request's answer as it grows: tokens to text, stop strings, what each piece adds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from engine.api.errors import TandemError, Unavailable, error_of
from engine.core import Delta, FinishReason, TokenLogprobs
from engine.text.detokenizer import Detokenizer
from engine.text.stop import StopMatcher


@dataclass(slots=True)
class Piece:
    """What one delta added. `text` may lag behind `tokens`: half a character, a stop string that may yet come."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)  # parallel to `tokens`, or empty
    offsets: list[int] = field(default_factory=list)  # characters of the answer before each token
    finish_reason: str | None = None

    @classmethod
    def joined(cls, pieces: Sequence[Piece]) -> Piece:
        return cls(
            text="".join(piece.text for piece in pieces),
            tokens=[token for piece in pieces for token in piece.tokens],
            logprobs=[logprob for piece in pieces for logprob in piece.logprobs],
            offsets=[offset for piece in pieces for offset in piece.offsets],
            finish_reason=pieces[-1].finish_reason if pieces else None,
        )


class Choice:
    """Feed it every delta of its request, in order, until a piece carries a finish reason."""

    def __init__(
        self, detokenizer: Detokenizer, matcher: StopMatcher, min_tokens: int, hidden_stops: frozenset[int]
    ) -> None:
        """A token of `hidden_stops` that ends the answer is counted but not shown."""
        self._detokenizer = detokenizer
        self._matcher = matcher
        self._min_tokens = min_tokens
        self._hidden_stops = hidden_stops
        self._num_characters = 0
        self.num_tokens = 0
        self.cached_tokens = 0
        self.block_ids: list[int] = []

    def feed(self, delta: Delta) -> Piece:
        """Raises the TandemError that the core reports: a failure never looks like an end."""
        if delta.finish_reason in (FinishReason.ERROR, FinishReason.ABORT):
            raise _failure(delta)
        self.cached_tokens = max(self.cached_tokens, delta.cached_tokens)
        self.block_ids = delta.block_ids or self.block_ids
        piece = Piece()
        for position, token in enumerate(delta.tokens):
            last = position == len(delta.tokens) - 1
            self._add(piece, token, hidden=last and self._is_hidden_stop(token, delta.finish_reason))
            if self._matcher.found is not None:
                piece.finish_reason = FinishReason.STOP.value
                break
        piece.logprobs = delta.logprobs[: len(piece.tokens)]
        if piece.finish_reason is None and delta.finish_reason is not None:
            self._finish(piece, delta.finish_reason)
        return piece

    def _is_hidden_stop(self, token: int, finish_reason: FinishReason | None) -> bool:
        return finish_reason is FinishReason.STOP and token in self._hidden_stops

    def _add(self, piece: Piece, token: int, hidden: bool) -> None:
        self.num_tokens += 1
        piece.tokens.append(token)
        piece.offsets.append(self._num_characters)
        if not hidden:
            self._show(piece, self._detokenizer.push(token))

    def _show(self, piece: Piece, text: str) -> None:
        self._num_characters += len(text)
        piece.text += self._matcher.push(text) if self.num_tokens > self._min_tokens else text

    def _finish(self, piece: Piece, reason: FinishReason) -> None:
        self._show(piece, self._detokenizer.finish())
        piece.text += self._matcher.finish()
        piece.finish_reason = (FinishReason.STOP if self._matcher.found is not None else reason).value


def _failure(delta: Delta) -> TandemError:
    if delta.finish_reason is FinishReason.ABORT:
        return Unavailable("The request was aborted on this engine")
    return error_of(delta.error_status, delta.error or "The engine failed without saying why")
