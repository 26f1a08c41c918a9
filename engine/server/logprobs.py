"""Log probabilities as JSON can carry them."""

from __future__ import annotations

from typing import Final

LEAST: Final = -9999.0  # what OpenAI writes for a token that cannot come; JSON has no infinity


def finite(logprob: float) -> float:
    return logprob if logprob > LEAST else LEAST
