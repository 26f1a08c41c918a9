"""Frequencies of rotary position embeddings (arXiv:2104.09864), with the ways of stretching them to longer contexts."""

from __future__ import annotations

from math import ceil, floor, log, pi

import numpy as np

from engine.models.config import Rope
from kernels.kinds import Floats


def inverse_frequencies(rope: Rope, head_dim: int) -> Floats:
    """Radians per token of each rotary pair: [head_dim / 2] float32."""
    pairs = np.arange(0, head_dim, 2, dtype=np.float32) / head_dim
    plain: Floats = np.reciprocal(np.power(np.float32(rope.theta), pairs))
    match rope.kind:
        case "default":
            return np.divide(plain, rope.divisors or 1, dtype=np.float32)
        case "linear":
            return np.divide(plain, rope.factor, dtype=np.float32)
        case "llama3":
            return _llama3(rope, plain)
        case "yarn":
            return _yarn(rope, plain, head_dim)


def _llama3(rope: Rope, plain: Floats) -> Floats:
    """Long wavelengths are stretched, short ones kept, those between blended by their turns in the first context."""
    turns = rope.original_max_positions * plain / (2 * pi)
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    return _between(plain / rope.factor, plain, blend)


def _yarn(rope: Rope, plain: Floats, head_dim: int) -> Floats:
    """YaRN's NTK-by-parts: a linear ramp over the pairs between two numbers of turns (arXiv:2309.00071, 3.2)."""

    def pair_with(turns: float) -> float:
        return head_dim * log(rope.original_max_positions / (turns * 2 * pi)) / (2 * log(rope.theta))

    low, high = pair_with(rope.beta_fast), pair_with(rope.beta_slow)
    if rope.truncate:
        low, high = floor(low), ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low or 0.001  # a ramp of no width would divide by zero
    ramp = (np.arange(head_dim // 2, dtype=np.float32) - low) / width
    return _between(plain, plain / rope.factor, ramp)


def _between(start: Floats, end: Floats, share: Floats) -> Floats:
    """From `start`, where the share is 0 or less, to `end`, where it is 1 or more."""
    between: Floats = start + np.clip(share, 0, 1, dtype=np.float32) * (end - start)
    return between
