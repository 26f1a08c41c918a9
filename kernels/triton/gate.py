"""The gate of a gated feed-forward block. For CUDA."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton.launch import warps_for

BLOCK = 1024


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up: [rows, 2 * inner], gates first, contiguous, to [rows, inner]."""
    assert gate_up.is_contiguous()
    rows, inner = len(gate_up), gate_up.shape[1] // 2
    result = torch.empty((rows, inner), dtype=gate_up.dtype, device=gate_up.device)
    _silu_mul[(rows, triton.cdiv(inner, BLOCK))](gate_up, result, inner, BLOCK=BLOCK, num_warps=warps_for(BLOCK))
    return result


@triton.jit
def _silu_mul(gate_up, result, inner, BLOCK: tl.constexpr):
    """One program a row and block of columns."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < inner
    gate = tl.load(gate_up + row * 2 * inner + column, mask=inside, other=0.0)
    up = tl.load(gate_up + (row * 2 + 1) * inner + column, mask=inside, other=0.0)
    wide = gate.to(tl.float32)
    activated = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype).to(tl.float32)
    tl.store(result + row * inner + column, (activated * up.to(tl.float32)).to(gate.dtype), mask=inside)
