"""Weights out of a Hugging Face directory: model.safetensors, or shards with an index. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from engine.models.errors import ModelLoadError
from engine.models.safetensors_file import SafetensorsFile
from engine.models.weights import Shapes, StoredTensor

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


class SafetensorsDirectory:
    def __init__(self, directory: Path) -> None:
        """Maps every file and reads its header. Raises ModelLoadError."""
        self._file_of = _files_by_tensor(directory)

    def shapes(self) -> Shapes:
        return {name: file.shapes[name] for name, file in self._file_of.items() if name in file.shapes}

    def tensor(self, name: str) -> StoredTensor:
        return self._file_of[name].tensor(name)


def _files_by_tensor(directory: Path) -> Mapping[str, SafetensorsFile]:
    if (directory / INDEX_FILE).is_file():
        names = _read_index(directory / INDEX_FILE)
        files = {name: SafetensorsFile(directory / name) for name in set(names.values())}
        return {name: files[file] for name, file in names.items()}
    if (directory / SINGLE_FILE).is_file():
        file = SafetensorsFile(directory / SINGLE_FILE)
        return dict.fromkeys(file.shapes, file)
    raise ModelLoadError(f"{directory} holds neither {SINGLE_FILE} nor {INDEX_FILE}; other weight formats are not read")


def _read_index(path: Path) -> dict[str, str]:
    """Tensor name to the shard's file name, which must be a plain name: an index may not lead out of its directory."""
    try:
        weight_map = json.loads(path.read_bytes())["weight_map"]
        files = {str(name): str(file) for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelLoadError(f"cannot read {path}: {error!r}") from error
    outside = [file for file in files.values() if Path(file).name != file]
    if outside:
        raise ModelLoadError(f"{path} names the shard {outside[0]!r}, which is not a file beside it")
    return files
