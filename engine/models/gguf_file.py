"""A GGUF file: its metadata, and its tensors' bytes as views of the file. Imports no torch.

Names of types, block sizes and the dequantisation itself are the gguf package's.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from engine.models.gguf_header import GGUFHeader, TensorInfo, read_header, unreadable


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    name: str
    shape: tuple[int, ...]  # as torch has it: rows first
    kind: GGMLQuantizationType
    rows: NDArray[np.uint8]  # [rows, bytes per row], a view of the file


@dataclass(frozen=True, slots=True)
class GGUFFile:
    path: Path
    metadata: dict[str, Any]  # scalars, strings, and lists of them
    tensors: dict[str, GGUFTensor]


def read_gguf(path: Path) -> GGUFFile:
    """Maps the file and reads its header. Raises ModelLoadError when it is not a whole GGUF file."""
    header = read_header(path)
    try:
        tensors = {name: _tensor(header, name, info) for name, info in header.tensors.items()}
    except (ValueError, IndexError) as error:
        raise unreadable(path, error) from error
    return GGUFFile(path, header.metadata, tensors)


def _tensor(header: GGUFHeader, name: str, info: TensorInfo) -> GGUFTensor:
    kind = GGMLQuantizationType(info.kind)
    block_items, block_bytes = GGML_QUANT_SIZES[kind]
    if info.shape[-1] % block_items:
        raise ValueError(f"the tensor {name} has rows of {info.shape[-1]} items, not whole {kind.name} blocks")
    row_bytes = info.shape[-1] // block_items * block_bytes
    num_rows = prod(info.shape[:-1])
    flat = np.frombuffer(header.view, dtype=np.uint8, count=num_rows * row_bytes, offset=info.offset)
    return GGUFTensor(name, info.shape, kind, flat.reshape(num_rows, row_bytes))
