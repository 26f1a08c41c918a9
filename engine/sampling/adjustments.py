"""What a request's history and wishes change in its logits, before temperature: bias, forbidden stops, penalties."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.core import SamplingParams
from engine.core import Sequence as Row


def changes_logits(row: Row) -> bool:
    sampling = row.request.sampling
    return bool(sampling.logit_bias) or _forbids_stops(row) or _penalizes(sampling)


def adjust(logits: Tensor, rows: Sequence[Row]) -> None:
    """Changes float32 logits [rows, vocab] in place, in vLLM's order: bias, min_tokens, penalties."""
    numbered = [(number, row) for number, row in enumerate(rows) if changes_logits(row)]
    _add_bias(logits, numbered)
    _forbid_stops(logits, numbered)
    _apply_penalties(logits, numbered)


def _forbids_stops(row: Row) -> bool:
    return row.num_output < row.request.sampling.min_tokens


def _penalizes(sampling: SamplingParams) -> bool:
    return sampling.repetition_penalty != 1.0 or sampling.presence_penalty != 0.0 or sampling.frequency_penalty != 0.0


Numbered = Sequence[tuple[int, Row]]


def _add_bias(logits: Tensor, numbered: Numbered) -> None:
    biases = [(number, row.request.sampling.logit_bias) for number, row in numbered]
    where = [(number, token) for number, bias in biases for token in bias]
    if where:
        amounts = torch.tensor([amount for _, bias in biases for amount in bias.values()], device=logits.device)
        logits.index_put_(_indices(where, logits), amounts, accumulate=True)


def _forbid_stops(logits: Tensor, numbered: Numbered) -> None:
    young = ((number, row) for number, row in numbered if _forbids_stops(row))
    where = [(number, token) for number, row in young for token in row.request.sampling.stop_token_ids]
    if where:
        logits.index_put_(_indices(where, logits), torch.tensor(-torch.inf, device=logits.device))


def _indices(where: Iterable[tuple[int, int]], like: Tensor) -> tuple[Tensor, Tensor]:
    rows, tokens = torch.tensor(list(where), device=like.device).unbind(1)
    return rows, tokens


@dataclass(frozen=True, slots=True)
class History:
    """The distinct tokens of one row, and what to do about each."""

    tokens: NDArray[np.int64]  # [distinct], of prompt and output
    counts: NDArray[np.int64]  # [distinct], in the output alone
    sampling: SamplingParams

    @classmethod
    def of(cls, row: Row) -> History:
        tokens, where = np.unique(np.array(row.tokens, dtype=np.int64), return_inverse=True)
        counts = np.bincount(where[row.prompt_length :], minlength=len(tokens))
        return cls(tokens, counts, row.request.sampling)

    def penalized(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """[distinct] to [distinct]. Repetition looks at prompt and output (CTRL, arXiv:1909.05858), as in Hugging Face
        and vLLM; presence and frequency look at the output alone, as in OpenAI's API."""
        repetition = np.float32(self.sampling.repetition_penalty)
        logits = np.where(logits > 0, logits / repetition, logits * repetition)
        frequency = np.float32(self.sampling.frequency_penalty) * self.counts
        presence = np.float32(self.sampling.presence_penalty) * (self.counts > 0)
        return (logits - frequency - presence).astype(np.float32)


def _apply_penalties(logits: Tensor, numbered: Numbered) -> None:
    for number, row in numbered:
        if _penalizes(row.request.sampling):
            history = History.of(row)
            tokens = torch.from_numpy(history.tokens).to(logits.device)
            penalized = history.penalized(logits[number, tokens].cpu().numpy())
            logits[number, tokens] = torch.from_numpy(penalized).to(logits.device)
