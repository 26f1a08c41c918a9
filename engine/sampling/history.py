"""What a sequence has said so far, as the penalties count it; kept from step to step."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from engine.core import Row, SamplingParams

FIRST_ROOM = 256  # distinct tokens


class History:
    """The distinct tokens of a prompt and its output, and how often each came in the output."""

    def __init__(self, prompt: list[int]) -> None:
        self._places = {token: place for place, token in enumerate(dict.fromkeys(prompt))}
        room = max(FIRST_ROOM, 2 * len(self._places))
        self._tokens = np.zeros(room, np.int64)
        self._counts = np.zeros(room, np.int64)
        self._tokens[: len(self._places)] = list(self._places)
        self._num_seen = len(prompt)

    def catch_up(self, tokens: list[int]) -> None:
        """`tokens` are the prompt and the output: those that are new since the last time are counted."""
        for token in tokens[self._num_seen :]:
            place = self._places.setdefault(token, len(self._places))
            if place == len(self._tokens):
                self._tokens = np.concatenate((self._tokens, np.zeros_like(self._tokens)))
                self._counts = np.concatenate((self._counts, np.zeros_like(self._counts)))
            self._tokens[place] = token
            self._counts[place] += 1
        self._num_seen = len(tokens)

    @property
    def tokens(self) -> NDArray[np.int64]:  # [distinct]
        return self._tokens[: len(self._places)]

    @property
    def counts(self) -> NDArray[np.int64]:  # [distinct], in the output alone
        return self._counts[: len(self._places)]

    def penalized(self, logits: NDArray[np.float32], sampling: SamplingParams) -> NDArray[np.float32]:
        """[distinct] to [distinct]. Repetition looks at prompt and output (CTRL, arXiv:1909.05858), as in Hugging Face
        and vLLM; presence and frequency look at the output alone, as in OpenAI's API."""
        repetition = np.float32(sampling.repetition_penalty)
        logits = np.where(logits > 0, logits / repetition, logits * repetition)
        if sampling.frequency_penalty or sampling.presence_penalty:
            frequency = np.float32(sampling.frequency_penalty) * self.counts
            presence = np.float32(sampling.presence_penalty) * (self.counts > 0)
            logits = (logits - frequency - presence).astype(np.float32)
        return logits


_histories: WeakKeyDictionary[Row, History] = WeakKeyDictionary()  # for as long as there is the sequence


def history_of(row: Row) -> History:
    """Up to the row's last token, at the cost of those that came since the last call."""
    history = _histories.get(row)
    if history is None:
        history = _histories[row] = History(row.request.prompt)
    history.catch_up(row.tokens)
    return history
