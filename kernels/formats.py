"""How weights lie in files: dense kinds, and GGUF's blocks of quantized ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from kernels.kinds import ITEM_TYPES, Kind

Quantized = Literal["q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "q4_k", "q5_k", "q6_k"]
Format = Kind | Quantized
Quantization = Literal["q8_0", "q4_0", "q4_1"]  # what dense weights can be quantized to


@dataclass(frozen=True, slots=True)
class Block:
    """Weights of one row that share a scale."""

    format: Quantized
    length: int  # weights
    num_bytes: int

    def row_bytes(self, columns: int) -> int:
        """Raises ValueError when blocks do not fill the row."""
        if columns % self.length:
            raise ValueError(f"{self.format} has blocks of {self.length} weights, which do not fill {columns} columns")
        return columns // self.length * self.num_bytes


BLOCKS: dict[Quantized, Block] = {
    block.format: block
    for block in (
        Block("q8_0", 32, 34),
        Block("q4_0", 32, 18),
        Block("q4_1", 32, 20),
        Block("q5_0", 32, 22),
        Block("q5_1", 32, 24),
        Block("q4_k", 256, 144),
        Block("q5_k", 256, 176),
        Block("q6_k", 256, 210),
    )
}


def item_type(format: Format) -> type[np.generic]:
    """Of a row's items in a file: bytes where it is quantized."""
    if format == "float32" or format == "bfloat16" or format == "float16":
        return ITEM_TYPES[format]
    return np.uint8


def row_items(format: Format, columns: int) -> int:
    """Of a row in a file. Raises ValueError when blocks do not fill the row."""
    return BLOCKS[format].row_bytes(columns) if format in BLOCKS else columns
