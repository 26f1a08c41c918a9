"""The kernels of this package in plain torch, the slow obvious way, on any device. Imports no Triton."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional


def rms_norm(rows: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """See norm.rms_norm. Over the last dimension, of whatever shape."""
    wide = rows.float()
    return (wide * (wide.square().mean(-1, keepdim=True) + epsilon).rsqrt()).to(rows.dtype) * weight


def add_rms_norm(stream: Tensor, addend: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """See norm.add_rms_norm."""
    stream += addend
    return rms_norm(stream, weight, epsilon)


def silu_mul(gate_up: Tensor) -> Tensor:
    """See gate.silu_mul."""
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate) * up


def rotate_and_store(
    projected: Tensor,
    turns: Tensor,
    positions: Tensor,
    slots: Tensor,
    keys: Tensor,
    values: Tensor,
    norms: tuple[Tensor, Tensor, float] | None = None,
) -> Tensor:
    """See rotary.rotate_and_store; `norms`: the fields of a HeadNorms."""
    num_kv_heads, block_size, head_dim = keys.shape[1:]
    heads = projected.view(len(projected), -1, head_dim)
    queries, new_keys, new_values = heads.split([heads.shape[1] - 2 * num_kv_heads, num_kv_heads, num_kv_heads], dim=1)
    if norms:
        query, key, epsilon = norms
        queries, new_keys = rms_norm(queries, query, epsilon), rms_norm(new_keys, key, epsilon)
    stored = slots >= 0
    blocks, offsets = slots[stored] // block_size, slots[stored] % block_size
    keys[blocks, :, offsets] = _rotate(new_keys, turns[positions])[stored]
    values[blocks, :, offsets] = new_values[stored]
    return _rotate(queries, turns[positions])


def _rotate(heads: Tensor, turns: Tensor) -> Tensor:
    """[tokens, heads, head_dim] by [tokens, head_dim]."""
    first, second = heads.float().chunk(2, dim=-1)
    cosine, sine = turns[:, None].chunk(2, dim=-1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1).to(heads.dtype)


def draw(logits: Tensor, choices: Tensor) -> Tensor:
    """See sampling.draw."""
    rows = zip(logits, choices.tolist(), strict=True)
    return torch.stack([_draw_row(row.float(), choice) for row, choice in rows])


def _draw_row(logits: Tensor, choice: Sequence[float]) -> Tensor:
    temperature, min_p, top_k, top_p, uniform = choice
    scores = logits / torch.tensor(temperature, dtype=torch.float32, device=logits.device)
    weights = (scores - scores.max()).exp()
    weights = weights.masked_fill(weights < min_p, 0).double()
    order = scores.sort(descending=True, stable=True).indices  # of equals the lower id first
    if top_k:
        weights[order[int(top_k) :]] = 0
    sums = weights[order].cumsum(0)
    before = sums - weights[order]
    if top_p < 1:
        weights[order[before >= top_p * sums[-1]]] = 0
    cumulative = weights.cumsum(0)
    return (cumulative <= uniform * cumulative[-1]).sum().clamp(max=int(weights.nonzero()[-1]))
