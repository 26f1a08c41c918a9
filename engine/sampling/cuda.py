"""From logits to tokens on a card: one launch for the batch, one copy there, one back. `sampler` is the reference."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.core import Row, StepOutput
from engine.sampling.adjustments import adjusted
from engine.sampling.logprobs import token_logprobs
from engine.sampling.randomness import uniforms
from engine.sampling.wishes import GREEDY_BELOW
from kernels.triton.sampling import NUM_CHOICES, draw

GREEDY = (1.0, 0.0, 1.0, 1.0)  # temperature, min_p, top_k, top_p: the one likeliest, the first of equals


class CudaSampler:
    def __init__(self, most_rows: int) -> None:
        self._choices = torch.empty((most_rows, NUM_CHOICES), dtype=torch.float64, pin_memory=True)
        self._tokens = torch.empty(most_rows, dtype=torch.int64, pin_memory=True)
        self._drawn = torch.cuda.Event()  # type: ignore[no-untyped-call]

    @torch.inference_mode()
    def __call__(self, logits: Tensor, rows: Sequence[Row]) -> StepOutput:
        """`logits` [rows, vocab], one for each sequence that samples, are left as they are. At most `most_rows` rows.
        Waits for the card."""
        self._choices[: len(rows)].numpy()[:] = choices_of(rows)
        choices = self._choices[: len(rows)].to(logits.device, non_blocking=True)
        tokens = draw(adjusted(logits, rows), choices)
        self._tokens[: len(rows)].copy_(tokens, non_blocking=True)
        self._drawn.record()
        logprobs = token_logprobs(logits, tokens, [row.request.sampling.logprobs for row in rows])
        self._drawn.synchronize()
        return StepOutput(self._tokens[: len(rows)].tolist(), logprobs)


def choices_of(rows: Sequence[Row]) -> NDArray[np.float64]:
    """[rows, 5], as `kernels.triton.sampling.draw` reads them."""
    wishes = [row.request.sampling for row in rows]
    numbers = uniforms([wish.seed for wish in wishes], [row.num_output for row in rows])
    settings = [
        GREEDY if wish.temperature < GREEDY_BELOW else (wish.temperature, wish.min_p, wish.top_k, wish.top_p)
        for wish in wishes
    ]
    return np.column_stack((np.array(settings, dtype=np.float64), numbers))
