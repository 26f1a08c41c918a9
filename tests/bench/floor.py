"""What the machine allows: the least time of a forward pass, from its bytes and flops and from what was measured."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from engine.models.config import ModelConfig

READ_BYTES = 256 << 20
MATRIX = 2048
BITS_16 = 2.0  # bytes per weight


@dataclass(frozen=True, slots=True)
class Case:
    """One step: `num_rows` sequences that have `context` tokens of KV each compute `num_new` more."""

    name: str
    num_rows: int
    num_new: int
    context: int

    def flops(self, config: ModelConfig) -> float:
        """Products of the layers for every token, of the head for a row's last, and attention."""
        tokens = self.num_rows * self.num_new
        seen = tokens * (self.context + (self.num_new + 1) / 2)
        attention = 4 * config.num_layers * config.num_heads * config.head_dim * seen
        return 2.0 * (layer_weights(config) * tokens + head_weights(config) * self.num_rows) + attention

    def bytes(self, config: ModelConfig, bytes_per_weight: float = BITS_16) -> float:
        """Every weight once, and each row's keys and values, in bfloat16."""
        cached = self.num_rows * self.context * config.num_layers * 2 * config.num_kv_heads * config.head_dim
        return bytes_per_weight * num_weights(config) + 2.0 * cached


@dataclass(frozen=True, slots=True)
class Machine:
    """What it did when measured: bytes read a second, bfloat16 operations a second."""

    read: float
    products: float

    def floor_s(self, case: Case, config: ModelConfig, bytes_per_weight: float = BITS_16) -> float:
        return max(case.bytes(config, bytes_per_weight) / self.read, case.flops(config) / self.products)


def layer_weights(config: ModelConfig) -> int:
    heads = 2 * config.num_heads + 2 * config.num_kv_heads
    return config.num_layers * config.hidden_size * (heads * config.head_dim + 3 * config.intermediate_size)


def head_weights(config: ModelConfig) -> int:
    return config.vocab_size * config.hidden_size


def num_weights(config: ModelConfig) -> int:
    """Of every matrix that a step reads; an embedding of its own is not read, only its few rows."""
    return layer_weights(config) + head_weights(config)


@dataclass
class Times:
    seconds: list[float] = field(default_factory=list)

    def measure(self, call: Callable[[], object]) -> None:
        started = time.perf_counter()
        call()
        self.seconds.append(time.perf_counter() - started)

    @property
    def least(self) -> float:
        return min(self.seconds)

    @property
    def middle(self) -> float:
        return float(np.median(self.seconds))


@dataclass
class Probe:
    """Measures the machine as often as it is asked to; the least of all tries counts. Uses torch's threads."""

    memory: torch.Tensor = field(default_factory=lambda: torch.ones(READ_BYTES // 4))
    matrix: torch.Tensor = field(default_factory=lambda: torch.ones(MATRIX, MATRIX, dtype=torch.bfloat16))
    read: Times = field(default_factory=Times)
    product: Times = field(default_factory=Times)

    def measure(self) -> None:
        self.read.measure(self.memory.sum)
        self.product.measure(lambda: self.matrix @ self.matrix)

    @property
    def machine(self) -> Machine:
        return Machine(self.memory.nbytes / self.read.least, 2 * len(self.matrix) ** 3 / self.product.least)
