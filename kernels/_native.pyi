"""What csrc/module.cpp defines; see kernels/cpu.py for the meaning."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kernels.formats import Format

def copy_ranges(source: memoryview, destination: memoryview, copies: NDArray[np.int64]) -> None: ...
def isa() -> str: ...
def set_threads(num_threads: int, cores: list[int]) -> None: ...
def num_threads() -> int: ...
def pack(matrix: NDArray[Any], kind: str, gated: bool) -> PackedWeight: ...
def pack_parts(
    items: list[NDArray[Any]], formats: list[Format], columns: int, kind: str, gated: bool
) -> PackedWeight: ...
def expand(rows: NDArray[Any], format: Format, kind: str, result: NDArray[Any]) -> None: ...
def quantize(matrix: NDArray[np.float32], format: Format, result: NDArray[np.uint8]) -> None: ...
def multiply(weight: PackedWeight, rows: NDArray[np.float32], result: NDArray[np.float32]) -> None: ...
def embed(weight: PackedWeight, ids: NDArray[np.int64], result: NDArray[np.float32]) -> None: ...
def normalise(
    rows: NDArray[np.float32], weight: NDArray[np.float32], epsilon: float, result: NDArray[np.float32]
) -> None: ...
def turn(heads: NDArray[np.float32], cos: NDArray[np.float32], sin: NDArray[np.float32]) -> None: ...
def gate(gates: NDArray[np.float32], values: NDArray[np.float32], result: NDArray[np.float32]) -> None: ...
def largest(items: NDArray[np.float32]) -> int: ...
def attend(
    queries: NDArray[np.float32],
    keys: NDArray[np.float32],
    values: NDArray[np.float32],
    starts: NDArray[np.int64],
    lengths: NDArray[np.int64],
    block_tables: NDArray[np.int64],
    pool: NDArray[Any],
    pool_kind: str,
    layer: int,
    scale: float,
    soft_cap: float,
    window: int,
    result: NDArray[np.float32],
) -> None: ...
def likeliest(logits: NDArray[np.float32], tokens: NDArray[np.int64]) -> None: ...
def choose(
    logits: NDArray[np.float32],
    temperature: NDArray[np.float32],
    min_p: NDArray[np.float32],
    top_k: NDArray[np.int64],
    top_p: NDArray[np.float64],
    uniform: NDArray[np.float64],
    tokens: NDArray[np.int64],
) -> None: ...
def logprobs(
    logits: NDArray[np.float32],
    rows: NDArray[np.int64],
    tokens: NDArray[np.int64],
    chosen: NDArray[np.float64],
    ids: NDArray[np.int64],
    logprobs: NDArray[np.float64],
) -> None: ...
def penalize(
    logits: NDArray[np.float32],
    tokens: NDArray[np.int64],
    counts: NDArray[np.int64],
    repetition: float,
    presence: float,
    frequency: float,
    before: NDArray[np.float32],
) -> None: ...

class PackedWeight:
    @property
    def rows(self) -> int: ...
    @property
    def columns(self) -> int: ...
    @property
    def gated(self) -> bool: ...
    @property
    def num_bytes(self) -> int: ...
    @property
    def input_kind(self) -> str: ...

class DecoderShape: ...
class DecoderLayer: ...

class Decoder:
    def __init__(
        self,
        shape: DecoderShape,
        embedding: PackedWeight,
        layers: list[DecoderLayer],
        norm: NDArray[np.float32],
        head: PackedWeight,
    ) -> None: ...
    def forward(
        self,
        tokens: NDArray[np.int64],
        starts: NDArray[np.int64],
        lengths: NDArray[np.int64],
        block_tables: NDArray[np.int64],
        sampled: NDArray[np.int64],
        pool: memoryview | NDArray[np.uint8],
        pool_kind: str,
        block_size: int,
    ) -> NDArray[np.float32]: ...
    @property
    def num_bytes(self) -> int: ...
