"""Draws one token for each row of a batch in one launch: temperature, min-p, top-k, top-p, inverse cumulative.

What is left to draw from is found by its least score, so nothing is sorted: scores become integers in the same order,
and halving their range finds the least that is still in. Of equal scores the lower token ids are in. Weights are summed
as integers, so that a row's token never depends on the order of summing, nor on the rows beside it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Columns of `choices`.
TEMPERATURE, MIN_P, TOP_K, TOP_P, UNIFORM = range(5)
NUM_CHOICES = 5

BLOCK = 4096
NUM_WARPS = 16
MOST_TOKENS = 1 << 18  # in a vocabulary: as many weights of WHOLE fit an int64
WHOLE = tl.constexpr(2.0**44)  # the likeliest token's weight
LOWEST = tl.constexpr(-(2**31))


def draw(logits: Tensor, choices: Tensor) -> Tensor:
    """Token ids [rows] int64 for logits [rows, vocab] of any floating dtype, each row contiguous.

    `choices`, [rows, 5] float64: temperature above 0, min_p, top_k (0 is off, 1 is greedy), top_p above 0, and a
    uniform number in [0, 1), whose place among the cumulative weights, in order of token id, is the token."""
    num_rows, vocab_size = logits.shape
    assert logits.stride(1) == 1
    assert choices.shape == (num_rows, NUM_CHOICES)
    assert vocab_size <= MOST_TOKENS
    scores = torch.empty((num_rows, vocab_size), dtype=torch.float32, device=logits.device)
    tokens = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    _draw[(num_rows,)](
        logits, choices, scores, tokens, vocab_size, logits.stride(0), BLOCK=BLOCK, num_warps=NUM_WARPS, num_stages=1
    )
    return tokens


@triton.jit
def _draw(logits, choices, scores, tokens, vocab_size, row_stride, BLOCK: tl.constexpr):
    """One program a row."""
    row = tl.program_id(0).to(tl.int64)
    choice = choices + row * 5
    scores += row * vocab_size
    top = _scale(logits + row * row_stride, tl.load(choice).to(tl.float32), scores, vocab_size, BLOCK)
    tl.debug_barrier()  # every thread reads what all have written
    min_p = tl.load(choice + 1).to(tl.float32)
    least, ties = _cut_count(scores, tl.load(choice + 2).to(tl.int64), top, vocab_size, BLOCK)
    above, one = _mass(scores, least, top, min_p, vocab_size, BLOCK)
    total = above + ties * one
    top_p = tl.load(choice + 3)
    if top_p < 1:
        needed = tl.minimum(tl.maximum(tl.ceil(top_p * total.to(tl.float64)).to(tl.int64), 1), total)
        nucleus = _cut_mass(scores, needed, least, top, min_p, vocab_size, BLOCK)
        above, one = _mass(scores, nucleus, top, min_p, vocab_size, BLOCK)
        enough = (needed - above + one - 1) // tl.maximum(one, 1)
        ties = tl.where(nucleus > least, enough, tl.minimum(enough, ties))
        least = nucleus
        total = above + ties * one
    target = tl.minimum((tl.load(choice + 4) * total.to(tl.float64)).to(tl.int64), total - 1)
    token = _pick(scores, target, least, ties, top, min_p, vocab_size, BLOCK)
    tl.store(tokens + row, tl.minimum(token, vocab_size - 1))


@triton.jit
def _scale(logits, temperature, scores, vocab_size, BLOCK: tl.constexpr):
    """Writes the row's scores, logits / temperature; returns the highest."""
    most = tl.full((BLOCK,), float("-inf"), tl.float32)
    for start in range(0, vocab_size, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < vocab_size
        logit = tl.load(logits + column, mask=inside, other=float("-inf")).to(tl.float32)
        score = tl.div_rn(logit, tl.zeros_like(logit) + temperature)
        score = tl.where(score == 0, 0.0, score)  # -0 and 0 are equals
        tl.store(scores + column, score, mask=inside)
        most = tl.maximum(most, score)
    return tl.max(most, axis=0)


@triton.jit
def _order(score):
    """An int32 in the same order as the float32."""
    bits = score.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _weight(score, top, min_p):
    weight = tl.exp(score - top)
    return (tl.where(weight < min_p, 0.0, weight) * WHOLE).to(tl.int64)


@triton.jit
def _cut_count(scores, top_k, top, vocab_size, BLOCK: tl.constexpr):
    """The order of the top_k-th score, and how many of its equals are within top_k. Off: below all, and none."""
    low = tl.zeros_like(top_k) + LOWEST
    ties = tl.zeros_like(top_k)
    if top_k > 0:
        wanted = tl.minimum(top_k, vocab_size)
        high = _order(top).to(tl.int64)
        low = tl.where(top_k == 1, high, low)
        while low < high:  # at least `wanted` scores are not below `low`; fewer are above `high`
            middle = low + (high - low + 1) // 2
            reaches = _count(scores, middle, vocab_size, BLOCK) >= wanted
            low = tl.where(reaches, middle, low)
            high = tl.where(reaches, high, middle - 1)
        ties = wanted - _count(scores, low + 1, vocab_size, BLOCK)
    return low, ties


@triton.jit
def _count(scores, least, vocab_size, BLOCK: tl.constexpr):
    """How many scores are not below `least`."""
    found = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, vocab_size, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < vocab_size
        order = _order(tl.load(scores + column, mask=inside, other=float("-inf"))).to(tl.int64)
        found += (inside & (order >= least)).to(tl.int32)
    return tl.sum(found, axis=0).to(tl.int64)


@triton.jit
def _cut_mass(scores, needed, low, top, min_p, vocab_size, BLOCK: tl.constexpr):
    """The order of the score with which the likeliest weigh `needed` together; not below `low`."""
    high = _order(top).to(tl.int64)
    while low < high:
        middle = low + (high - low + 1) // 2
        above, _ = _mass(scores, middle - 1, top, min_p, vocab_size, BLOCK)
        low = tl.where(above >= needed, middle, low)
        high = tl.where(above >= needed, high, middle - 1)
    return low


@triton.jit
def _mass(scores, least, top, min_p, vocab_size, BLOCK: tl.constexpr):
    """What all scores above `least` weigh together, and what a score equal to it weighs."""
    above = tl.zeros((BLOCK,), tl.int64)
    equal = tl.zeros((BLOCK,), tl.int64)
    for start in range(0, vocab_size, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < vocab_size
        score = tl.load(scores + column, mask=inside, other=float("-inf"))
        weight, order = _weight(score, top, min_p), _order(score).to(tl.int64)
        above += tl.where(inside & (order > least), weight, 0)
        equal = tl.maximum(equal, tl.where(inside & (order == least), weight, 0))
    return tl.sum(above, axis=0), tl.max(equal, axis=0)


@triton.jit
def _pick(scores, target, least, ties, top, min_p, vocab_size, BLOCK: tl.constexpr):
    """The first token at which the weights, summed in order of token id, pass `target`."""
    token = tl.zeros((), tl.int64)
    passed = tl.zeros((), tl.int64)  # weight of the blocks before
    seen = tl.zeros((), tl.int64)  # equals of `least` in the blocks before
    for start in range(0, vocab_size, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < vocab_size
        score = tl.load(scores + column, mask=inside, other=float("-inf"))
        order = _order(score).to(tl.int64)
        equal = (inside & (order == least)).to(tl.int64)
        kept = inside & ((order > least) | ((equal > 0) & (seen + tl.cumsum(equal, axis=0) <= ties)))
        weight = tl.where(kept, _weight(score, top, min_p), 0)
        short = inside & (passed + tl.cumsum(weight, axis=0) <= target)
        token += tl.sum(short.to(tl.int64), axis=0)
        passed += tl.sum(weight, axis=0)
        seen += tl.sum(equal, axis=0)
    return token
