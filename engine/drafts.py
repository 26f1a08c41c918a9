"""What a sequence may say next, read off what it has said: text repeats itself.

Drafted tokens are computed in the same step as the token before them, each as a row more, and a token is sampled after
each. As long as what is sampled is what was drafted, the next sample is worth something too. So answers stay what they
are, and come sooner where they quote the prompt, themselves, or a turn of phrase. Known as prompt lookup decoding
(Saxena, 2023) or n-gram speculation.
"""

from __future__ import annotations

from array import array
from weakref import WeakKeyDictionary

from engine.core import Sequence
from engine.sampling.wishes import penalizes

RUNS = (3, 2)  # tokens: where the longest of these runs that end the text came before, it went on as it may now
LOOK_BACK = 16_384  # tokens; to search more would take a tenth of a millisecond
TOKEN_TYPE = "I"
TOKEN_BYTES = array(TOKEN_TYPE).itemsize


def count_accepted(draft: list[int], sampled: list[int]) -> int:
    """How many of a draft are what was sampled; `sampled` has one token more, the last after all of the draft."""
    return next((place for place, token in enumerate(draft) if sampled[place] != token), len(draft))


class Drafter:
    """Drafts for all sequences of an engine."""

    def __init__(self, most: int) -> None:
        """`most` tokens of a sequence in a step; 0: none."""
        self.most = most
        self.num_drafted = 0
        self.num_accepted = 0
        self._echoes: WeakKeyDictionary[Sequence, Echo] = WeakKeyDictionary()

    def draft(self, sequence: Sequence, most: int) -> list[int]:
        """At most `most` tokens that may follow its known ones, and as many as its answer still has room for. None for
        one whose repetitions are penalized: they are not what it will say."""
        sampling = sequence.request.sampling
        most = min(most, self.most, sampling.max_tokens - sequence.num_output - 1)
        if most <= 0 or penalizes(sampling):
            return []
        echo = self._echoes.get(sequence)
        if echo is None:
            echo = self._echoes[sequence] = Echo()
        return echo.draft(sequence.tokens, most)

    def settle(self, sequence: Sequence, num_drafted: int, num_accepted: int) -> None:
        """Of its last draft so many were what was sampled."""
        self.num_drafted += num_drafted
        self.num_accepted += num_accepted
        self._echoes[sequence].settle(num_accepted)


class Echo:
    """One sequence's text, to be searched, and how much of it to trust."""

    def __init__(self) -> None:
        self._text = bytearray()  # TOKEN_BYTES a token
        self._length = 1  # tokens of the next draft

    def draft(self, tokens: list[int], most: int) -> list[int]:
        """`tokens` is the text so far, and begins with that of the call before."""
        self._text += array(TOKEN_TYPE, tokens[len(self._text) // TOKEN_BYTES :]).tobytes()
        for run in RUNS:
            place = self._after_last(run)
            if place is not None:
                period = len(tokens) - place  # what has come twice may come more often
                return [tokens[place + i % period] for i in range(min(self._length, most))]
        return []

    def settle(self, num_accepted: int) -> None:
        self._length = max(2 * num_accepted, 1)

    def _after_last(self, run: int) -> int | None:
        """The place behind where the text's last `run` tokens last came before."""
        wanted, end = self._text[-run * TOKEN_BYTES :], len(self._text) - TOKEN_BYTES
        first = max(0, len(self._text) - LOOK_BACK * TOKEN_BYTES)
        while (found := self._text.rfind(wanted, first, end)) >= 0:
            if found % TOKEN_BYTES == 0:
                return found // TOKEN_BYTES + run
            end = found + len(wanted) - 1
        return None
