"""The products of kernels.weight, written the slow, obvious way, over the matrix as it was before it was packed."""

from __future__ import annotations

import numpy as np

from kernels.kinds import Floats, Items, Kind, narrowed, widened
from kernels.reference_rows import silu_mul


def multiply(rows: Floats, matrix: Items, kind: Kind, gated: bool = False) -> Floats:
    """See kernels.weight.multiply and pack_weight."""
    inputs = widened(narrowed(rows, kind), kind) if kind == "bfloat16" else rows
    products = (inputs.astype(np.float64) @ widened(matrix, kind).T.astype(np.float64)).astype(np.float32)
    if not gated:
        return products
    gates, values = np.split(products, 2, axis=1)
    return silu_mul(gates, values)
