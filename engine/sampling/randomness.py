"""Chance that can be looked up: the draw for a token depends on its request's seed and its index in the output alone.

So a seeded request gets the same tokens whatever it is batched with, after a preemption, and when another engine goes
on with it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)
_SEED_BITS = (1 << 64) - 1


def uniforms(seeds: Sequence[int], counters: Sequence[int]) -> NDArray[np.float64]:
    """One number in [0, 1) for each (seed, counter), 53 bits fine. Seeds are taken modulo 2**64."""
    seed = np.array([value & _SEED_BITS for value in seeds], dtype=np.uint64)
    counter = np.array(counters, dtype=np.uint64)
    # The seed is mixed before the counter comes in, so that seeds 1 and 2 are not one stream a step apart.
    bits = _splitmix64(_splitmix64(seed) + counter * _GOLDEN)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _splitmix64(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's output for a state (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014)."""
    mixed = state + _GOLDEN
    mixed = (mixed ^ (mixed >> np.uint64(30))) * _FIRST
    mixed = (mixed ^ (mixed >> np.uint64(27))) * _SECOND
    return mixed ^ (mixed >> np.uint64(31))
