"""One call from logits to tokens, for a whole batch of requests that each want something else."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from engine.core import Row, StepOutput
from engine.sampling.adjustments import adjusted
from engine.sampling.draw import Choice, draw
from engine.sampling.logprobs import token_logprobs
from engine.sampling.randomness import uniforms
from engine.sampling.wishes import GREEDY_BELOW


@torch.inference_mode()
def sample(logits: Tensor, rows: Sequence[Row]) -> StepOutput:
    """`logits` [rows, vocab], one for each sequence that samples, are left as they are. A batch of greedy, plain
    rows costs an argmax and no more."""
    chosen_from = adjusted(logits, rows)
    tokens = _choose(chosen_from, rows)  # [rows] int64
    wanted = [row.request.sampling.logprobs for row in rows]
    return StepOutput(tokens.tolist(), token_logprobs(logits, tokens, wanted))


def _choose(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    drawing = [number for number, row in enumerate(rows) if row.request.sampling.temperature >= GREEDY_BELOW]
    if len(drawing) == len(rows):
        return draw(logits.float(), _choice(rows, logits.device))
    tokens = logits.max(-1).indices  # the first of equals, as argmax, at a fifth of its cost
    if drawing:
        choice = _choice([rows[number] for number in drawing], logits.device)
        tokens[drawing] = draw(logits[drawing].float(), choice)
    return tokens


def _choice(rows: Sequence[Row], device: torch.device) -> Choice:
    wishes = [row.request.sampling for row in rows]
    numbers = uniforms([wish.seed for wish in wishes], [row.num_output for row in rows])
    return Choice(
        temperature=torch.tensor([wish.temperature for wish in wishes], dtype=torch.float32, device=device),
        min_p=torch.tensor([wish.min_p for wish in wishes], dtype=torch.float32, device=device),
        top_k=torch.tensor([wish.top_k for wish in wishes], dtype=torch.int64, device=device),
        top_p=torch.tensor([wish.top_p for wish in wishes], dtype=torch.float64, device=device),
        uniform=torch.from_numpy(np.ascontiguousarray(numbers)).to(device),
    )
