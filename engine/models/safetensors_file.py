"""One safetensors file: 8 bytes of length, so many bytes of JSON, then the tensors' bytes. Imports no torch.

Our own reader, because NumPy has no bfloat16 and the safetensors package gives it to torch alone.
"""

from __future__ import annotations

import mmap
import struct
from math import prod
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np

from engine.models.errors import ModelLoadError
from engine.models.weights import Shapes, StoredTensor
from kernels.kinds import ITEM_TYPES, Kind

KINDS: dict[str, Kind] = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
METADATA = "__metadata__"
LENGTH = struct.Struct("<Q")
MAX_HEADER_BYTES = 100_000_000  # the format's own bound


class _Info(msgspec.Struct, frozen=True):
    """A tensor's entry in the header."""

    dtype: str
    shape: tuple[Annotated[int, msgspec.Meta(ge=0)], ...]
    data_offsets: tuple[Annotated[int, msgspec.Meta(ge=0)], int]  # behind the header, the end exclusive


class SafetensorsFile:
    def __init__(self, path: Path) -> None:
        """Maps the file and reads its header. Raises ModelLoadError when it is not a whole safetensors file."""
        self.path = path
        try:
            with path.open("rb") as file:
                self._view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._read_header()
        except (OSError, ValueError, struct.error, msgspec.DecodeError) as error:
            raise ModelLoadError(f"cannot read {path}: {error}") from error

    def _read_header(self) -> None:
        (length,) = LENGTH.unpack_from(self._view)
        self._data = LENGTH.size + length  # where the tensors begin
        if length > MAX_HEADER_BYTES or self._data > len(self._view):
            raise ValueError(f"its header of {length} bytes does not fit in the file")
        header = msgspec.json.decode(self._view[LENGTH.size : self._data], type=dict[str, msgspec.Raw])
        header.pop(METADATA, None)
        self._infos = {name: msgspec.json.decode(raw, type=_Info) for name, raw in header.items()}

    @property
    def shapes(self) -> Shapes:
        return {name: info.shape for name, info in self._infos.items()}

    def tensor(self, name: str) -> StoredTensor:
        """A view of the file. Raises ModelLoadError when its numbers are not floats of 16 or 32 bits, or not there."""
        info = self._infos[name]
        if info.dtype not in KINDS:
            raise ModelLoadError(f"{self.path} has {name} as {info.dtype}; read are {', '.join(KINDS)}")
        kind, (start, end) = KINDS[info.dtype], info.data_offsets
        if end - start != prod(info.shape) * np.dtype(ITEM_TYPES[kind]).itemsize or end > len(self._view) - self._data:
            raise ModelLoadError(f"{self.path} has {name}, of shape {info.shape}, at bytes {start} to {end}")
        flat = np.frombuffer(self._view, np.uint8, end - start, self._data + start)
        return StoredTensor(info.shape, kind, flat.reshape(prod(info.shape[:-1]), -1))
