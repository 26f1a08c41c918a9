"""What is done to one row at a time. Native only: see kernels.cpu.NATIVE; `reference_rows` is the same in NumPy."""

from __future__ import annotations

import numpy as np

from kernels import _native
from kernels.kinds import Floats


def rms_norm(rows: Floats, weight: Floats, epsilon: float) -> Floats:
    """rows / rms(rows) * weight: [rows, n] and [n] to [rows, n] (arXiv:1910.07467)."""
    result = np.empty_like(rows)
    _native.normalise(rows, weight, epsilon, result)
    return result


def rotate(heads: Floats, cos: Floats, sin: Floats) -> Floats:
    """Rotary embedding of pairs (i, i + dim / 2): [tokens, heads, dim], turned by cos and sin [tokens, dim / 2]."""
    turned = heads.copy()
    _native.turn(turned, cos, sin)
    return turned


def silu_mul(gates: Floats, values: Floats) -> Floats:
    """silu(gates) * values, of any equal shape."""
    result = np.empty(gates.size, np.float32)
    _native.gate(gates.ravel(), values.ravel(), result)
    return result.reshape(gates.shape)


def argmax(items: Floats) -> int:
    """The place of the largest of [n], the first of equals; 0 where no number is above minus infinity."""
    return _native.largest(items)
