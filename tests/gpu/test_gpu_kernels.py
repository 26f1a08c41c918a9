"""The Triton kernels, compiled for the card: each is its torch reference, for shapes of real models."""

from __future__ import annotations

import pytest
import torch

from tests.gpu.card import MISSING

if MISSING:
    pytest.skip(MISSING, allow_module_level=True)

from tests.kernels import triton_cases
from tests.kernels.triton_cases import Numbers

pytestmark = pytest.mark.gpu

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "size"), [(1, 576), (7, 1), (33, 1030), (512, 4096), (2, 8192)])
def test_norm(rows: int, size: int, dtype: torch.dtype) -> None:
    triton_cases.check_norm(Numbers(size, dtype, "cuda"), rows, size)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "inner"), [(1, 1536), (5, 80), (512, 14336)])
def test_gate(rows: int, inner: int, dtype: torch.dtype) -> None:
    triton_cases.check_gate(Numbers(inner, dtype, "cuda"), rows, inner)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(9, 3, 64), (32, 8, 128), (6, 1, 12), (16, 16, 64), (8, 4, 256), (14, 2, 64)]
)
def test_rotary(heads: int, kv_heads: int, head_dim: int, normed: bool, dtype: torch.dtype) -> None:
    for tokens in (1, 40):
        triton_cases.check_rotary(Numbers(heads, dtype, "cuda"), tokens, heads, kv_heads, head_dim, normed)


@pytest.mark.parametrize("vocab_size", [1, 5000, 49_152, 151_936, 1 << 18])
@pytest.mark.parametrize("seed", range(6))
def test_draw(seed: int, vocab_size: int) -> None:
    triton_cases.check_draw(seed, rows=8, vocab_size=vocab_size, device="cuda")
