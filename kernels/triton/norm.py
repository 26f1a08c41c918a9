"""RMS normalisation, alone or together with the addition to the residual stream before it. For CUDA."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton.launch import warps_for


def rms_norm(rows: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """rows / rms(rows) * weight: [rows, size] contiguous, and [size]. Rounded to the dtype before the weight, as in
    `reference.rms_norm`."""
    return _launch(rows, None, weight, epsilon)


def add_rms_norm(stream: Tensor, addend: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Adds to the residual stream in place, and returns the sum normalised: all [rows, size], contiguous."""
    return _launch(stream, addend, weight, epsilon)


def _launch(rows: Tensor, addend: Tensor | None, weight: Tensor, epsilon: float) -> Tensor:
    assert rows.is_contiguous()
    assert addend is None or addend.is_contiguous()
    result = torch.empty_like(rows)
    size = rows.shape[-1]
    block = triton.next_power_of_2(size)
    _norm[(len(rows),)](
        rows,
        rows if addend is None else addend,
        weight,
        result,
        size,
        epsilon,
        ADDS=addend is not None,
        BLOCK=block,
        num_warps=warps_for(block),
    )
    return result


@triton.jit
def _norm(rows, addend, weight, result, size, epsilon, ADDS: tl.constexpr, BLOCK: tl.constexpr):
    """One program a row."""
    column = tl.arange(0, BLOCK)
    inside = column < size
    place = tl.program_id(0).to(tl.int64) * size + column
    items = tl.load(rows + place, mask=inside, other=0.0)
    if ADDS:
        added = tl.load(addend + place, mask=inside, other=0.0)
        items = (items.to(tl.float32) + added.to(tl.float32)).to(items.dtype)
        tl.store(rows + place, items, mask=inside)
    wide = items.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / size + epsilon)
    normed = (wide * scale).to(items.dtype).to(tl.float32)
    factor = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(result + place, (normed * factor).to(items.dtype), mask=inside)
