"""Logits changed for the time of a choice: what bias, forbidden stops and penalties touch is put back after it.

A row has some fifty thousand logits, of which a request changes a few: those are saved, the others never copied.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from engine.core import Sequence as Row
from engine.sampling.history import history_of
from engine.sampling.wishes import changes_logits, forbids_stops, penalizes

Logits = NDArray[np.float32]


@contextmanager
def adjusted(logits: Logits, rows: Sequence[Row]) -> Iterator[None]:
    """Within it `logits` [rows, vocab] are as the rows want them, in vLLM's order: bias, min_tokens, penalties."""
    changing = [(number, row) for number, row in enumerate(rows) if changes_logits(row)]
    saved = [(number, *_adjust(logits[number], row)) for number, row in changing]
    try:
        yield
    finally:
        for number, tokens, values in saved:
            logits[number, tokens] = values


def _adjust(logits: Logits, row: Row) -> tuple[NDArray[np.int64], Logits]:
    """Changes a row's logits [vocab]; returns which, and what they were."""
    sampling = row.request.sampling
    biased = np.fromiter(sampling.logit_bias, np.int64, len(sampling.logit_bias))
    stops = np.array(sampling.stop_token_ids if forbids_stops(row) else (), np.int64)
    history = history_of(row) if penalizes(sampling) else None
    touched = np.concatenate((biased, stops, history.tokens)) if history else np.concatenate((biased, stops))
    values = logits[touched]
    logits[biased] += np.fromiter(sampling.logit_bias.values(), np.float32, len(biased))
    logits[stops] = -np.inf
    if history:
        logits[history.tokens] = history.penalized(logits[history.tokens], sampling)
    return touched, values
