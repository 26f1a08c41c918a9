"""Whether these tests can run: on a machine with an NVIDIA card and with the libraries that the engine uses there."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch

# Triton warns, once, that another release will fuse additions differently; warnings are errors in tests.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")


def _missing() -> str | None:
    if not torch.cuda.is_available():
        return "there is no NVIDIA card here, or torch is not CUDA's"
    absent = [name for name in ("triton", "flashinfer") if find_spec(name) is None]
    return f"not installed: {', '.join(absent)}; pip install 'tandem[cuda]'" if absent else None


MISSING = _missing()  # None: all is here
