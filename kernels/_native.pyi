"""What csrc/module.cpp defines; see kernels/cpu.py for the meaning."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

def copy_ranges(source: memoryview, destination: memoryview, copies: NDArray[np.int64]) -> None: ...
def isa() -> str: ...
def set_threads(num_threads: int, cores: list[int]) -> None: ...
def num_threads() -> int: ...
def pack(matrix: NDArray[Any], kind: str, gated: bool) -> PackedWeight: ...

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
