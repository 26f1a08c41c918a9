"""A GGUF file's header: its metadata, and where each tensor's bytes lie. Imports no torch.

Our own reader, because the gguf package's makes arrays of every token of the vocabulary (3.6 s for SmolLM2, against
0.1 s here). Names of types, block sizes and the dequantisation itself are the package's. Format: ggml's docs/gguf.md.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from numpy.typing import NDArray

from engine.models.errors import ModelLoadError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_DIMENSIONS = 4

_SCALARS = {
    GGUFValueType.UINT8: "<u1",
    GGUFValueType.INT8: "<i1",
    GGUFValueType.UINT16: "<u2",
    GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4",
    GGUFValueType.INT32: "<i4",
    GGUFValueType.FLOAT32: "<f4",
    GGUFValueType.UINT64: "<u8",
    GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT64: "<f8",
    GGUFValueType.BOOL: "?",
}


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
    try:
        with path.open("rb") as file:
            view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return _Header(path, view).read()
    except OSError as error:
        raise ModelLoadError(f"cannot read {path}: {error}") from error
    except (ValueError, struct.error, IndexError) as error:
        raise ModelLoadError(f"{path} is not a readable GGUF file: {error}") from error


class _Header:
    """A cursor over the header. Every read is checked against the file's end by struct and numpy."""

    def __init__(self, path: Path, view: mmap.mmap) -> None:
        self.path = path
        self.view = view
        self.offset = 0

    def read(self) -> GGUFFile:
        if self.view[:4] != MAGIC:
            raise ValueError("it does not start with the letters GGUF")
        self.offset = 4
        version = self._unpack("<I")
        if version not in VERSIONS:
            raise ValueError(f"its version is {version}, supported are {VERSIONS}")
        num_tensors, num_fields = self._unpack("<Q"), self._unpack("<Q")
        metadata = {self._string(): self._value() for _ in range(num_fields)}
        infos = [self._tensor_info() for _ in range(num_tensors)]
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"its alignment is {alignment!r}")
        start = -(-self.offset // alignment) * alignment
        tensors = {name: self._tensor(name, shape, kind, start + at) for name, shape, kind, at in infos}
        return GGUFFile(self.path, metadata, tensors)

    def _unpack(self, form: str) -> int:
        (value,) = struct.unpack_from(form, self.view, self.offset)
        self.offset += struct.calcsize(form)
        return int(value)

    def _string(self) -> str:
        length = self._unpack("<Q")
        if self.offset + length > len(self.view):
            raise ValueError("a string runs past the end of the file")
        raw = self.view[self.offset : self.offset + length]
        self.offset += length
        return raw.decode("utf-8", errors="replace")

    def _value(self) -> Any:
        kind = GGUFValueType(self._unpack("<I"))
        if kind is GGUFValueType.ARRAY:
            item_kind = GGUFValueType(self._unpack("<I"))
            return self._array(item_kind, self._unpack("<Q"))
        if kind is GGUFValueType.STRING:
            return self._string()
        return self._scalars(kind, 1)[0]

    def _array(self, kind: GGUFValueType, count: int) -> list[Any]:
        if count > len(self.view):
            raise ValueError("an array is longer than the file")
        if kind is GGUFValueType.STRING:
            return [self._string() for _ in range(count)]
        return self._scalars(kind, count)

    def _scalars(self, kind: GGUFValueType, count: int) -> list[Any]:
        if kind not in _SCALARS:
            raise ValueError(f"a value of kind {kind.name} inside an array")
        values = np.frombuffer(self.view, dtype=_SCALARS[kind], count=count, offset=self.offset)
        self.offset += values.nbytes
        return list(values.tolist())

    def _tensor_info(self) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int]:
        name, num_dimensions = self._string(), self._unpack("<I")
        if num_dimensions > MAX_DIMENSIONS:
            raise ValueError(f"the tensor {name} has {num_dimensions} dimensions")
        shape = tuple(self._unpack("<Q") for _ in range(num_dimensions))[::-1]
        return name, shape, GGMLQuantizationType(self._unpack("<I")), self._unpack("<Q")

    def _tensor(self, name: str, shape: tuple[int, ...], kind: GGMLQuantizationType, at: int) -> GGUFTensor:
        block_items, block_bytes = GGML_QUANT_SIZES[kind]
        if shape[-1] % block_items:
            raise ValueError(f"the tensor {name} has rows of {shape[-1]} items, not whole {kind.name} blocks")
        row_bytes = shape[-1] // block_items * block_bytes
        num_rows = prod(shape[:-1])
        flat = np.frombuffer(self.view, dtype=np.uint8, count=num_rows * row_bytes, offset=at)
        return GGUFTensor(name, shape, kind, flat.reshape(num_rows, row_bytes))
