"""kernels.rows, written the slow, obvious way."""

from __future__ import annotations

import numpy as np

from kernels.kinds import Floats


def rms_norm(rows: Floats, weight: Floats, epsilon: float) -> Floats:
    exact = rows.astype(np.float64)
    scale = 1 / np.sqrt((exact**2).mean(axis=-1, keepdims=True) + epsilon)
    result: Floats = (exact * scale * weight).astype(np.float32)
    return result


def rotate(heads: Floats, cos: Floats, sin: Floats) -> Floats:
    first, second = np.split(heads, 2, axis=-1)  # [tokens, heads, dim / 2]
    cosines, sines = cos[:, None], sin[:, None]
    return np.concatenate((first * cosines - second * sines, second * cosines + first * sines), axis=-1)


def silu_mul(gates: Floats, values: Floats) -> Floats:
    exact = gates.astype(np.float64)
    with np.errstate(over="ignore"):  # exp of a large number is infinity, and its inverse 0, as it should be
        result: Floats = (exact / (1 + np.exp(-exact)) * values).astype(np.float32)
    return result


def argmax(items: Floats) -> int:
    return int(items.argmax())
