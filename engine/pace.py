"""How fast this engine computes, measured as it runs, and what follows for the next step.

A step costs about `base + tokens * per_token` seconds, where `tokens` are those of sequences that catch up. Both are
followed by moving averages, so the model adapts to the machine, the batch and its neighbours.
"""

from __future__ import annotations

from engine.core import Sequence

SMOOTHING = 0.2  # weight of the newest measurement
MIN_CHUNK = 16  # tokens; less would starve prompts to no stream's profit
MEASURABLE_CHUNK = 16  # tokens; a shorter chunk drowns in the base cost
HEAD_START_S = 0.5  # of waiting: a newcomer is soon passed over only by those near their end
LEAST_LEFT_S = 1e-4  # told apart no further


class Pace:
    """Seconds per decode step and per caught-up token."""

    def __init__(self) -> None:
        self.base_s = 0.0
        self.per_token_s = 0.0

    def observe(self, num_tokens: int, seconds: float) -> None:
        """A step took `seconds` and computed `num_tokens` tokens of sequences that catch up."""
        if num_tokens == 0:
            self.base_s = follow(self.base_s, seconds)
        elif num_tokens >= MEASURABLE_CHUNK:
            self.per_token_s = follow(self.per_token_s, max(seconds - self.base_s, 0.0) / num_tokens)

    def seconds_for(self, num_tokens: int) -> float:
        """How long so many tokens will take to catch up."""
        return num_tokens * self.per_token_s

    def tokens_within(self, seconds: float, most: int) -> int:
        """The longest chunk whose step ends within `seconds`, from MIN_CHUNK to `most` tokens."""
        if self.per_token_s == 0.0:
            return most
        fits = min(most, (seconds - self.base_s) / self.per_token_s)  # may be infinite: no int before the bound
        return max(min(MIN_CHUNK, most), int(fits))


def follow(average: float, value: float) -> float:
    """The moving average with one more measurement; 0 is none yet."""
    return value if average == 0.0 else average + SMOOTHING * (value - average)


def urgency(sequence: Sequence, pace: Pace, now: float) -> tuple[int, float]:
    """Sort key, the most urgent first: who has waited longest for the time that is left. That is what its missing
    tokens take, so that a short prompt hardly waits behind a long one, and the long one's turn comes; or what a
    deadline for its first token leaves beside that, where this is less. One that is late already competes like any
    other, so as not to make more of them late.
    """
    request, waited = sequence.request, now - sequence.arrival
    left = remaining = pace.seconds_for(sequence.num_missing)
    if request.slo_ttft_ms is not None and sequence.num_output == 0:
        slack = request.slo_ttft_ms / 1e3 - waited - remaining
        left = min(left, slack) if slack >= 0 else left
    return request.priority, -(waited + HEAD_START_S) / max(left, LEAST_LEFT_S)
