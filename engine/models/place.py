"""Where a model runs, and in which kind of numbers. By name: torch has types for both, and is not needed for them."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import cast, get_args

from engine.models.errors import ModelLoadError
from kernels import cpu
from kernels.kinds import Kind

FAST_BFLOAT16 = ("amx", "avx512_bf16")  # instruction sets that multiply it
CUDA_DRIVER = "libcuda.so.1"


@dataclass(frozen=True, slots=True)
class Place:
    dtype: Kind  # of weights that are not quantised, and of the KV
    device: str  # cpu, cuda or cuda:N

    @property
    def device_type(self) -> str:
        return self.device.partition(":")[0]


def choose_place(dtype: str = "auto", device: str = "auto") -> Place:
    """`dtype`: auto, float32, bfloat16 or float16; `device`: auto, cpu, cuda or cuda:N. Imports torch only where an
    NVIDIA driver is installed or CUDA is asked for. Raises ModelLoadError."""
    chosen = _device(device)
    if dtype != "auto" and dtype not in get_args(Kind):
        raise ModelLoadError(f"unknown dtype {dtype!r}: expected auto, {', '.join(get_args(Kind))}")
    return Place(_fastest_dtype(chosen) if dtype == "auto" else cast(Kind, dtype), chosen)


def _device(device: str) -> str:
    if device == "auto":
        return "cuda" if _has_driver() and _num_gpus() else "cpu"
    kind, _, index = device.partition(":")
    if kind not in ("cpu", "cuda") or (index and not (kind == "cuda" and index.isdecimal())):
        raise ModelLoadError(f"unknown device {device!r}: expected auto, cpu, cuda or cuda:N")
    if kind == "cuda" and int(index or 0) >= (found := _num_gpus()):
        raise ModelLoadError(
            f"device {device} was asked for, but torch sees {found} GPUs: expected an NVIDIA GPU and CUDA's torch"
        )
    return device


def _has_driver() -> bool:
    """Torch needs this library for every GPU; asking for it takes no time, and importing torch takes seconds."""
    try:
        ctypes.CDLL(CUDA_DRIVER)
    except OSError:
        return False
    return True


def _num_gpus() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _fastest_dtype(device: str) -> Kind:
    if device == "cpu":
        return "bfloat16" if _multiplies_bfloat16() else "float32"
    import torch

    return "bfloat16" if torch.cuda.is_bf16_supported() else "float16"


def _multiplies_bfloat16() -> bool:
    if cpu.NATIVE:
        return cpu.isa() in FAST_BFLOAT16
    import torch  # the forward will be torch's

    can = torch.cpu.get_capabilities()
    return bool(can.get("avx512_bf16") or can.get("amx_bf16"))
