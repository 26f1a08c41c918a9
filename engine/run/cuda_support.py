"""Whether FlashInfer and Triton can run a model here, or why not. Imports neither before it is asked."""

from __future__ import annotations

import os
import shutil
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from engine.models.config import ModelConfig
from kernels.kinds import Kind

HEAD_DIMS = (64, 128, 256)
LIBRARIES = ("triton", "flashinfer")
BUILT_KERNELS = "flashinfer_jit_cache"
CUDA_TOOLKIT = "/usr/local/cuda"  # where FlashInfer looks when nothing says otherwise


def obstacle(config: ModelConfig, dtype: Kind) -> str | None:
    """What keeps this model from them, in words; None: nothing does. For a machine with a card."""
    if dtype == "float32":
        return "FlashInfer attends in bfloat16 and float16, not in float32"
    if config.head_dim not in HEAD_DIMS:
        return f"FlashInfer has no kernels for heads of {config.head_dim}: expected {', '.join(map(str, HEAD_DIMS))}"
    for library in LIBRARIES:
        if missing := _missing(library):
            return f"{missing}; pip install 'tandem[cuda]'"
    if not (_has_compiler() or find_spec(BUILT_KERNELS)):
        return (
            "FlashInfer builds its kernels with nvcc and found none: install the CUDA toolkit or flashinfer-jit-cache"
        )
    return None


def _missing(library: str) -> str | None:
    try:
        import_module(library)
    except (ImportError, OSError, RuntimeError) as error:  # a library it needs may be of another version, or not load
        return f"{library} cannot be imported ({error})"
    return None


def _has_compiler() -> bool:
    toolkit = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or CUDA_TOOLKIT
    return shutil.which("nvcc") is not None or (Path(toolkit) / "bin" / "nvcc").is_file()
