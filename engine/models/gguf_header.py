"""A GGUF file's header: its metadata, and what it says of each tensor. Imports neither NumPy nor torch, because the API
process reads its vocabulary here, at the start.

Our own reader, because the gguf package's makes arrays of every token of the vocabulary (3.6 s for SmolLM2, against
0.1 s here). Format: ggml's docs/gguf.md.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from engine.models.errors import ModelLoadError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_DIMENSIONS = 4

STRING: Final = 8
ARRAY: Final = 9
# The kinds of a value, as ggml numbers them, to struct's letters.
SCALARS: Final = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}

_LENGTH: Final = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    shape: tuple[int, ...]  # as torch has it: rows first
    kind: int  # ggml's number of its quantisation
    offset: int  # bytes from the file's start


@dataclass(frozen=True, slots=True)
class GGUFHeader:
    path: Path
    view: mmap.mmap  # the whole file
    metadata: dict[str, Any]  # scalars, strings, and lists of them
    tensors: dict[str, TensorInfo]


def read_header(path: Path) -> GGUFHeader:
    """Maps the file and reads its header. Raises ModelLoadError when it is not a GGUF file."""
    try:
        with path.open("rb") as file:
            view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return _Cursor(path, view).read()
    except OSError as error:
        raise ModelLoadError(f"cannot read {path}: {error}") from error
    except (ValueError, struct.error, IndexError) as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: Exception) -> ModelLoadError:
    return ModelLoadError(f"{path} is not a readable GGUF file: {error}")


class _Cursor:
    """Where in the header we are. Every read is checked against the file's end."""

    def __init__(self, path: Path, view: mmap.mmap) -> None:
        self.path = path
        self.view = view
        self.offset = 0

    def read(self) -> GGUFHeader:
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
        tensors = {name: TensorInfo(shape, kind, start + at) for name, shape, kind, at in infos}
        return GGUFHeader(self.path, self.view, metadata, tensors)

    def _unpack(self, form: str) -> int:
        (value,) = struct.unpack_from(form, self.view, self.offset)
        self.offset += struct.calcsize(form)
        return int(value)

    def _string(self) -> str:
        return self._strings(1)[0]

    def _value(self) -> Any:
        kind = self._unpack("<I")
        if kind == ARRAY:
            item_kind = self._unpack("<I")
            return self._array(item_kind, self._unpack("<Q"))
        return self._array(kind, 1)[0]

    def _array(self, kind: int, count: int) -> list[Any]:
        if count > len(self.view):
            raise ValueError("an array is longer than the file")
        return self._strings(count) if kind == STRING else self._scalars(kind, count)

    def _strings(self, count: int) -> list[str]:
        """A vocabulary has 100,000 and more: nothing is called for each that need not be."""
        view, file_end, length_at, found = self.view, len(self.view), _LENGTH.unpack_from, []
        end = self.offset
        for _ in range(count):
            begin = end + 8
            end = begin + length_at(view, end)[0]
            if end > file_end:
                raise ValueError("a string runs past the end of the file")
            found.append(view[begin:end].decode("utf-8", "replace"))
        self.offset = end
        return found

    def _scalars(self, kind: int, count: int) -> list[Any]:
        if kind not in SCALARS:
            raise ValueError(f"a value of kind {kind}, which is none or cannot be in an array")
        form = f"<{count}{SCALARS[kind]}"
        values = struct.unpack_from(form, self.view, self.offset)
        self.offset += struct.calcsize(form)
        return list(values)

    def _tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        name, num_dimensions = self._string(), self._unpack("<I")
        if num_dimensions > MAX_DIMENSIONS:
            raise ValueError(f"the tensor {name} has {num_dimensions} dimensions")
        shape = tuple(self._unpack("<Q") for _ in range(num_dimensions))[::-1]
        return name, shape, self._unpack("<I"), self._unpack("<Q")
