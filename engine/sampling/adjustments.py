"""On torch: what a request's history and wishes change in its logits before temperature."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from engine.core import Row
from engine.sampling.history import history_of
from engine.sampling.wishes import changes_logits, forbids_stops, penalizes


def adjusted(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """Logits [rows, vocab] as the rows want them: a copy in float32, or themselves where no row wants anything."""
    if not any(changes_logits(row) for row in rows):
        return logits
    changed = logits.to(torch.float32, copy=True)
    adjust(changed, rows)
    return changed


def adjust(logits: Tensor, rows: Sequence[Row]) -> None:
    """Changes float32 logits [rows, vocab] in place, in vLLM's order: bias, min_tokens, penalties."""
    numbered = [(number, row) for number, row in enumerate(rows) if changes_logits(row)]
    _add_bias(logits, numbered)
    _forbid_stops(logits, numbered)
    _apply_penalties(logits, numbered)


Numbered = Sequence[tuple[int, Row]]


def _add_bias(logits: Tensor, numbered: Numbered) -> None:
    biases = [(number, row.request.sampling.logit_bias) for number, row in numbered]
    where = [(number, token) for number, bias in biases for token in bias]
    if where:
        amounts = torch.tensor([amount for _, bias in biases for amount in bias.values()], device=logits.device)
        logits.index_put_(_indices(where, logits), amounts, accumulate=True)


def _forbid_stops(logits: Tensor, numbered: Numbered) -> None:
    young = ((number, row) for number, row in numbered if forbids_stops(row))
    where = [(number, token) for number, row in young for token in row.request.sampling.stop_token_ids]
    if where:
        logits.index_put_(_indices(where, logits), torch.tensor(-torch.inf, device=logits.device))


def _indices(where: Iterable[tuple[int, int]], like: Tensor) -> tuple[Tensor, Tensor]:
    rows, tokens = torch.tensor(list(where), device=like.device).unbind(1)
    return rows, tokens


def _apply_penalties(logits: Tensor, numbered: Numbered) -> None:
    for number, row in numbered:
        sampling = row.request.sampling
        if penalizes(sampling):
            history = history_of(row)
            tokens = torch.from_numpy(history.tokens).to(logits.device)
            penalized = history.penalized(logits[number, tokens].cpu().numpy(), sampling)
            logits[number, tokens] = torch.from_numpy(penalized).to(logits.device)
