"""Logits changed for the time of a choice: what bias, forbidden stops and penalties touch is put back after it.

A row has some fifty thousand logits, of which a request changes a few: those are saved, the others never copied.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.core import Row
from engine.sampling.history import history_of
from engine.sampling.wishes import changes_logits, forbids_stops, penalizes
from kernels.sampling import penalize

Logits = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Saved:
    """What some of a row's logits were."""

    logits: Logits  # [vocab]
    tokens: NDArray[np.int64]
    values: Logits

    def put_back(self) -> None:
        self.logits[self.tokens] = self.values


@contextmanager
def adjusted(logits: Logits, rows: Sequence[Row]) -> Iterator[None]:
    """Within it `logits` [rows, vocab] are as the rows want them, in vLLM's order: bias, min_tokens, penalties."""
    saved: list[Saved] = []
    try:
        for number, row in enumerate(rows):
            if changes_logits(row):
                saved.extend(_adjust(logits[number], row))
        yield
    finally:
        for one in reversed(saved):
            one.put_back()


def _adjust(logits: Logits, row: Row) -> Iterator[Saved]:
    if row.request.sampling.logit_bias:
        yield _add_bias(logits, row)
    if forbids_stops(row):
        yield _forbid_stops(logits, row)
    if penalizes(row.request.sampling):
        yield _penalize(logits, row)


def _add_bias(logits: Logits, row: Row) -> Saved:
    bias = row.request.sampling.logit_bias
    tokens = np.fromiter(bias, np.int64, len(bias))
    saved = Saved(logits, tokens, logits[tokens])
    logits[tokens] = saved.values + np.fromiter(bias.values(), np.float32, len(bias))
    return saved


def _forbid_stops(logits: Logits, row: Row) -> Saved:
    tokens = np.array(row.request.sampling.stop_token_ids, np.int64)
    saved = Saved(logits, tokens, logits[tokens])
    logits[tokens] = -np.inf
    return saved


def _penalize(logits: Logits, row: Row) -> Saved:
    history, sampling = history_of(row), row.request.sampling
    penalties = sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty
    return Saved(logits, history.tokens, penalize(logits, history.tokens, history.counts, *penalties))
