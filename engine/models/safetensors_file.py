"""One safetensors file: 8 bytes of length, so many bytes of JSON, then the tensors' bytes. Imports no torch.

Our own reader, because NumPy has no bfloat16 and the safetensors package gives it to torch alone.
"""

from __future__ import annotations

import json
import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from engine.models.errors import ModelLoadError
from engine.models.weights import Shapes, StoredTensor

ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
LENGTH = struct.Struct("<Q")
MAX_HEADER_BYTES = 100_000_000  # the format's own bound


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a tensor lies, and as what."""

    shape: tuple[int, ...]
    format: str
    start: int  # in the file
    num_bytes: int


class SafetensorsFile:
    def __init__(self, path: Path) -> None:
        """Maps the file and reads its header. Raises ModelLoadError when it is not a whole safetensors file."""
        self.path = path
        try:
            with path.open("rb") as file:
                self._view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._places = _read_header(self._view)
        except (OSError, ValueError, struct.error, KeyError, TypeError, AttributeError) as error:
            raise ModelLoadError(f"cannot read {path}: {error!r}") from error

    @property
    def shapes(self) -> Shapes:
        return {name: place.shape for name, place in self._places.items()}

    def tensor(self, name: str) -> StoredTensor:
        """A view of the file. Raises ModelLoadError when its numbers are not floats of 16 or 32 bits."""
        place = self._places[name]
        if place.format not in ITEM_BYTES:
            raise ModelLoadError(f"{self.path} has {name} as {place.format}; read are {', '.join(ITEM_BYTES)}")
        if place.num_bytes != prod(place.shape) * ITEM_BYTES[place.format]:
            raise ModelLoadError(f"{self.path} has {place.num_bytes} bytes for {name}, of shape {place.shape}")
        flat = np.frombuffer(self._view, np.uint8, place.num_bytes, place.start)
        return StoredTensor(place.shape, place.format, flat.reshape(prod(place.shape[:-1]), -1))


def _read_header(view: mmap.mmap) -> dict[str, _Place]:
    (length,) = LENGTH.unpack_from(view)
    if length > min(MAX_HEADER_BYTES, len(view) - LENGTH.size):
        raise ValueError(f"its header of {length} bytes does not fit in the file")
    data = LENGTH.size + length
    header = json.loads(view[LENGTH.size : data])
    return {name: _place(name, info, data, len(view)) for name, info in header.items() if name != "__metadata__"}


def _place(name: str, info: dict[str, Any], data: int, file_bytes: int) -> _Place:
    start, end = info["data_offsets"]
    if not 0 <= start <= end <= file_bytes - data:
        raise ValueError(f"the tensor {name} lies outside the file")
    return _Place(tuple(info["shape"]), info["dtype"], data + start, end - start)
