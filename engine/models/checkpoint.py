"""Opens a checkpoint: its config, and its weights where they lie. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from engine.models.config import ModelConfig, read_config
from engine.models.gguf_config import read_gguf_config
from engine.models.gguf_file import read_gguf
from engine.models.gguf_weights import GGUFWeights
from engine.models.safetensors_directory import SafetensorsDirectory
from engine.models.weights import WeightSource, check_shapes, weight_shapes


@dataclass(frozen=True, slots=True)
class Checkpoint:
    config: ModelConfig
    weights: WeightSource  # they have the shapes that the config asks for


def open_checkpoint(path: Path) -> Checkpoint:
    """`path` as `resolve.resolve` gives it. Reads headers alone. Raises ModelLoadError, saying what was expected."""
    if path.is_dir():
        return _checked(read_config(path), SafetensorsDirectory(path))
    file = read_gguf(path)
    config = read_gguf_config(file)
    return _checked(config, GGUFWeights(file, config))


def _checked(config: ModelConfig, weights: WeightSource) -> Checkpoint:
    check_shapes(weights.shapes(), weight_shapes(config))
    return Checkpoint(config, weights)
