"""Opens a checkpoint and makes it a decoder, ready to run."""

from __future__ import annotations

from pathlib import Path

import torch

from engine.layers.placement import Placement
from engine.models.config import ModelConfig, read_config
from engine.models.decoder import Decoder
from engine.models.errors import ModelLoadError
from engine.models.gguf_config import read_gguf_config
from engine.models.gguf_file import read_gguf
from engine.models.gguf_weights import GGUFWeights
from engine.models.safetensors_directory import SafetensorsDirectory
from engine.models.weights import WeightSource, load_weights

DTYPE_NAMES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(path: Path, dtype: str = "auto", device: str = "auto") -> Decoder:
    """`path` as `resolve.resolve` gives it. Raises ModelLoadError, saying what was expected."""
    place = placement(dtype, device)
    config, source = open_checkpoint(path)
    decoder = Decoder(config, place)
    load_weights(source, decoder.targets())
    return decoder


def open_checkpoint(path: Path) -> tuple[ModelConfig, WeightSource]:
    """Reads the config, not yet the weights."""
    if path.is_dir():
        return read_config(path), SafetensorsDirectory(path)
    file = read_gguf(path)
    config = read_gguf_config(file)
    return config, GGUFWeights(file, config)


def placement(dtype: str, device: str) -> Placement:
    """`dtype`: auto, float32, bfloat16 or float16; `device`: auto, cpu or cuda. Raises ModelLoadError."""
    chosen = _device(device)
    if dtype != "auto" and dtype not in DTYPE_NAMES:
        raise ModelLoadError(f"unknown dtype {dtype!r}: expected auto, {', '.join(DTYPE_NAMES)}")
    return Placement(_fastest_dtype(chosen) if dtype == "auto" else DTYPE_NAMES[dtype], chosen)


def _device(device: str) -> torch.device:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = device.partition(":")
    if kind not in ("cpu", "cuda") or (index and not (kind == "cuda" and index.isdecimal())):
        raise ModelLoadError(f"unknown device {device!r}: expected auto, cpu, cuda or cuda:N")
    found = torch.cuda.device_count()
    if kind == "cuda" and int(index or 0) >= found:
        raise ModelLoadError(
            f"device {device} was asked for, but torch sees {found} GPUs: expected an NVIDIA GPU and CUDA's torch"
        )
    return torch.device(device)


def _fastest_dtype(device: torch.device) -> torch.dtype:
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    can = torch.cpu.get_capabilities()
    return torch.bfloat16 if can.get("avx512_bf16") or can.get("amx_bf16") else torch.float32
