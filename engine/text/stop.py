"""Stop strings, found wherever they lie across token borders."""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Passes text on, but holds back the longest suffix that could still become a stop string.

        passed on      held     not yet seen
    | The answer is 42 \\nUs |  er: ...            stop = "\\nUser:"

    One Knuth-Morris-Pratt automaton per stop string: constant amortised work per character, however the text is cut.
    """

    def __init__(self, stops: Sequence[str], include_stop: bool = False) -> None:
        """`stops` are not empty strings. The stop string itself is passed on only with `include_stop`."""
        self._automata = [_Automaton(stop) for stop in stops]
        self._include_stop = include_stop
        self._held = ""
        self.found: str | None = None

    def push(self, text: str) -> str:
        """The text that is certain now. After a stop string is found nothing more comes out."""
        if self.found is not None:
            return ""
        if not self._automata:
            return text
        joined = self._held + text
        for position, character in enumerate(text, start=len(self._held) + 1):
            if stop := self._advance(character):
                return self._cut(joined[:position], stop)
        return self._release(joined)

    def finish(self) -> str:
        """What was held back, when no more text will come."""
        held, self._held = self._held, ""
        return held

    def _advance(self, character: str) -> str | None:
        """The longest stop string that ends with this character."""
        ended = [automaton.stop for automaton in self._automata if automaton.advance(character)]
        return max(ended, key=len, default=None)

    def _cut(self, text: str, stop: str) -> str:
        self.found, self._held = stop, ""
        return text if self._include_stop else text[: len(text) - len(stop)]

    def _release(self, text: str) -> str:
        certain = len(text) - max(automaton.matched for automaton in self._automata)
        self._held = text[certain:]
        return text[:certain]


class _Automaton:
    """`matched` is the length of the longest prefix of `stop` that the text so far ends with."""

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.matched = 0
        self._fallback = _fallbacks(stop)

    def advance(self, character: str) -> bool:
        """Whether the stop string ends here."""
        while self.matched and self.stop[self.matched] != character:
            self.matched = self._fallback[self.matched - 1]
        if self.stop[self.matched] == character:
            self.matched += 1
        if self.matched < len(self.stop):
            return False
        self.matched = self._fallback[-1]
        return True


def _fallbacks(stop: str) -> list[int]:
    """For each prefix of `stop`, the length of its longest proper prefix that is also its suffix."""
    lengths = [0] * len(stop)
    matched = 0
    for i in range(1, len(stop)):
        while matched and stop[i] != stop[matched]:
            matched = lengths[matched - 1]
        matched += stop[i] == stop[matched]
        lengths[i] = matched
    return lengths
