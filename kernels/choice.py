"""How the rows of a batch choose their tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kernels.kinds import Floats, Indices


@dataclass(frozen=True, slots=True)
class Choice:
    """How each row chooses. All [rows]."""

    temperature: Floats  # 0: the likeliest token
    min_p: Floats  # tokens below this share of the likeliest's probability are out; 0: none
    top_k: Indices  # so many of the likeliest stay; 0: all
    top_p: NDArray[np.float64]  # the likeliest that together have this share of what is left stay; 1: all
    uniform: NDArray[np.float64]  # in [0, 1)
