"""Weights out of a Hugging Face directory: model.safetensors, or shards with an index."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open

from engine.models.errors import ModelLoadError
from engine.models.weights import Targets

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


class SafetensorsDirectory:
    def __init__(self, directory: Path) -> None:
        self._file_of = _files_by_tensor(directory)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        shapes = {}
        for path, names in self._names_by_file(self._file_of).items():
            with _open(path) as file:
                held = set(file.keys())
                shapes.update({name: tuple(file.get_slice(name).get_shape()) for name in names if name in held})
        return shapes

    def fill(self, targets: Targets) -> None:
        for path, names in self._names_by_file(targets).items():
            with _open(path) as file:
                for name in names:
                    targets[name].copy_(file.get_tensor(name))

    def _names_by_file(self, names: Mapping[str, object]) -> Mapping[Path, list[str]]:
        grouped: dict[Path, list[str]] = defaultdict(list)
        for name in names:
            grouped[self._file_of[name]].append(name)
        return grouped


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise ModelLoadError(f"cannot read {path}: {error}") from error


def _files_by_tensor(directory: Path) -> dict[str, Path]:
    if (directory / INDEX_FILE).is_file():
        return {name: directory / file for name, file in _read_index(directory / INDEX_FILE).items()}
    if (directory / SINGLE_FILE).is_file():
        with _open(directory / SINGLE_FILE) as file:
            return dict.fromkeys(file.keys(), directory / SINGLE_FILE)
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
