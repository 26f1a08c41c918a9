"""Every request that has not had its last delta, and the deltas on their way to the API process.

A request is closed by exactly one of `append` (it finished), `fail`, `hold` and `forget`; after that its sequence says
nothing more, whatever still happens to its blocks.
"""

from __future__ import annotations

from engine.core import Delta, FinishReason, ModelInfo, Request, Sequence, TokenLogprobs


class Requests:
    def __init__(self, model: ModelInfo) -> None:
        self._model = model
        self._open: dict[str, Sequence] = {}
        self._outbox: dict[str, Delta] = {}
        self.prompt_tokens = 0
        self.output_tokens = 0
        self.cached_tokens = 0

    def __len__(self) -> int:
        return len(self._open)

    def get(self, request_id: str) -> Sequence | None:
        return self._open.get(request_id)

    def open(self, request: Request, now: float) -> Sequence:
        assert request.id not in self._open, f"request id {request.id} is in use"
        sequence = Sequence.of(request, now)
        self._open[request.id] = sequence
        self.prompt_tokens += sequence.prompt_length
        return sequence

    def is_open(self, sequence: Sequence) -> bool:
        return self._open.get(sequence.request.id) is sequence

    def check(self, sequence: Sequence, token: int, logprobs: TokenLogprobs | None) -> None:
        """Raises ValueError for a token, said elsewhere, that no engine like this one can have sampled for it."""
        if not 0 <= token < self._model.vocab_size:
            raise ValueError(f"token {token} is outside the vocabulary of {self._model.vocab_size}")
        wanted = sequence.request.sampling.logprobs
        if (logprobs is None) != (wanted is None):
            raise ValueError("log-probabilities come exactly when they are asked for")
        if logprobs is not None and not len(logprobs.top_ids) == len(logprobs.top_logprobs) <= (wanted or 0):
            raise ValueError(f"{len(logprobs.top_ids)} likeliest tokens with {len(logprobs.top_logprobs)} numbers")

    def append(self, sequence: Sequence, token: int, logprobs: TokenLogprobs | None) -> bool:
        """The sequence's next token, told to the client; True when that was its last."""
        delta = self._tell(sequence, token, logprobs)
        delta.finish_reason = self._finish_reason(sequence)
        if delta.finish_reason is None:
            return False
        self.forget(sequence)
        return True

    def hold(self, sequence: Sequence, token: int, logprobs: TokenLogprobs | None) -> None:
        """A Give's one token; its blocks stay behind under a lease."""
        delta = self._tell(sequence, token, logprobs)
        delta.finish_reason = self._finish_reason(sequence) or FinishReason.LENGTH
        delta.block_ids = list(sequence.block_table)
        self.forget(sequence)

    def fail(self, sequence: Sequence, message: str, status: int) -> None:
        if self.is_open(sequence):
            delta = self._delta(sequence)
            delta.finish_reason, delta.error, delta.error_status = FinishReason.ERROR, message, status
            self.forget(sequence)

    def forget(self, sequence: Sequence) -> None:
        """Nothing more will be said of it; what is in the outbox still goes."""
        if self.is_open(sequence):
            del self._open[sequence.request.id]

    def discard(self, sequence: Sequence) -> None:
        """The client has gone: not even the outbox's part is wanted."""
        self.forget(sequence)
        self._outbox.pop(sequence.request.id, None)

    def drain(self) -> list[Delta]:
        deltas, self._outbox = list(self._outbox.values()), {}
        return deltas

    def _tell(self, sequence: Sequence, token: int, logprobs: TokenLogprobs | None) -> Delta:
        sequence.tokens.append(token)
        self.output_tokens += 1
        if sequence.num_output == 1:
            self.cached_tokens += sequence.num_cached
        delta = self._delta(sequence)
        delta.tokens.append(token)
        if logprobs is not None:
            delta.logprobs.append(logprobs)
        return delta

    def _delta(self, sequence: Sequence) -> Delta:
        request_id = sequence.request.id
        if request_id not in self._outbox:
            self._outbox[request_id] = Delta(request_id=request_id, cached_tokens=sequence.num_cached)
        return self._outbox[request_id]

    def _finish_reason(self, sequence: Sequence) -> FinishReason | None:
        sampling = sequence.request.sampling
        if sequence.tokens[-1] in sampling.stop_token_ids and sequence.num_output > sampling.min_tokens:
            return FinishReason.STOP
        if sequence.num_output >= sampling.max_tokens or len(sequence.tokens) >= self._model.max_model_len:
            return FinishReason.LENGTH
        return None
