"""Drawing tokens: temperature, min-p, top-k, top-p, in vLLM's order, then one uniform number per row against the rest.

Everything is per row and ties go to the lower token id, so a row's token never depends on the rows beside it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FIRST_CANDIDATES = 256  # a nucleus is nearly always smaller
MORE_CANDIDATES = 16  # where it is not, so many times more are sorted, until they are enough
_TIE_BREAK = 2.0**-40  # per token id: below the spacing of the float32 logits that matter, above float64's


@dataclass(frozen=True, slots=True)
class Choice:
    """How each row chooses. All [rows], on the logits' device."""

    temperature: Tensor  # float32, above 0
    min_p: Tensor  # float32
    top_k: Tensor  # int64, 0 is off
    top_p: Tensor  # float64
    uniform: Tensor  # float64 in [0, 1)

    def __getitem__(self, rows: Tensor) -> Choice:
        return Choice(self.temperature[rows], self.min_p[rows], self.top_k[rows], self.top_p[rows], self.uniform[rows])


def draw(logits: Tensor, choice: Choice) -> Tensor:
    """Token ids [rows] int64 for float32 logits [rows, vocab]."""
    scaled = logits / choice.temperature[:, None]
    weights = (scaled - scaled.amax(-1, keepdim=True)).exp_()  # the likeliest token's is 1
    if bool(choice.min_p.any()):
        weights.masked_fill_(weights < choice.min_p[:, None], 0)
    tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    truncated = (choice.top_k > 0) | (choice.top_p < 1)
    whole, cut = torch.nonzero(~truncated).squeeze(1), torch.nonzero(truncated).squeeze(1)
    if len(whole):
        tokens[whole] = pick(weights[whole].double(), choice.uniform[whole])
    if len(cut):
        tokens[cut] = _draw_truncated(scaled[cut], weights[cut], choice[cut])
    return tokens


def pick(weights: Tensor, uniform: Tensor) -> Tensor:
    """Inverse of the cumulative weights: indices [rows] into float64 weights [rows, n], never of a weight of 0."""
    cumulative = weights.cumsum(-1)
    total = cumulative[:, -1:]
    target = torch.minimum(uniform[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target, right=True).squeeze(1).clamp_(max=weights.shape[1] - 1)


def largest(scores: Tensor, count: int) -> Tensor:
    """Ids [rows, count] of the largest scores [rows, vocab], in falling order; of equals, the lower id first.

    The ties are broken in the numbers, because top-k's own order of equals changes with the batch's shape.
    """
    ids = torch.arange(scores.shape[-1], device=scores.device, dtype=torch.float64)
    return torch.topk(scores.double() - ids * _TIE_BREAK, count, dim=-1).indices


def _draw_truncated(scaled: Tensor, weights: Tensor, choice: Choice) -> Tensor:
    """Rows with a top-k or a top-p. A full sort costs ten times the rest, so only as many candidates as it takes."""
    vocab_size = scaled.shape[-1]
    count = int(torch.where(choice.top_k > 0, choice.top_k, FIRST_CANDIDATES).max())
    while True:
        ids = largest(scaled, min(count, vocab_size))  # [rows, count]
        kept, enough = _truncate(weights.gather(-1, ids).double(), weights, choice)
        if count >= vocab_size or bool(enough.all()):
            return _pick_by_id(ids, kept, choice.uniform)
        count *= MORE_CANDIDATES


def _pick_by_id(ids: Tensor, weights: Tensor, uniform: Tensor) -> Tensor:
    """`pick` with the candidates in the order of their ids. In that of their weights, rivals that are nearly equal
    would change places with every rounding error, and a seeded request would draw the one here, the other there."""
    ordered, order = ids.sort(dim=-1)
    return ordered.gather(-1, pick(weights.gather(-1, order), uniform)[:, None]).squeeze(1)


def _truncate(sorted_weights: Tensor, weights: Tensor, choice: Choice) -> tuple[Tensor, Tensor]:
    """The candidates' weights, 0 where cut; and per row whether the candidates reach as far as the cut."""
    rank = torch.arange(sorted_weights.shape[-1], device=weights.device)
    limited = choice.top_k[:, None] > 0
    kept = sorted_weights.masked_fill(limited & (rank >= choice.top_k[:, None]), 0)
    reach = kept.cumsum(-1)
    total = torch.where(limited, reach[:, -1:], weights.sum(-1, keepdim=True, dtype=torch.float64))
    nucleus = choice.top_p[:, None] * total
    before = reach - kept  # what likelier tokens weigh together
    before[:, 0] = -1  # the likeliest token is always in
    enough = limited | (reach[:, -1:] >= nucleus)
    return kept.masked_fill(before >= nucleus, 0), enough.squeeze(1)
