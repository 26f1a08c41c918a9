"""The Triton kernels without a card: under Triton's interpreter they are their references. On a card, tests/gpu runs
the same checks on the compiled kernels."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

if torch.cuda.is_available():
    pytest.skip("a card is here: tests/gpu runs these checks on it", allow_module_level=True)
os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined, Triton's own at its import
pytest.importorskip("triton", reason="Triton is not installed: it comes with CUDA's torch, or by itself")

from kernels.triton import sampling
from tests.kernels import triton_cases
from tests.kernels.triton_cases import Numbers

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of what is masked out afterwards

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "size"), [(1, 1), (3, 48), (2, 576), (2, 1030)])
def test_norm(rows: int, size: int, dtype: torch.dtype) -> None:
    triton_cases.check_norm(Numbers(size, dtype, "cpu"), rows, size)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "inner"), [(1, 1), (3, 80), (2, 1536)])
def test_gate(rows: int, inner: int, dtype: torch.dtype) -> None:
    triton_cases.check_gate(Numbers(inner, dtype, "cpu"), rows, inner)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(9, 3, 64), (6, 1, 12), (2, 2, 32)])
def test_rotary(heads: int, kv_heads: int, head_dim: int, normed: bool, dtype: torch.dtype) -> None:
    triton_cases.check_rotary(Numbers(heads, dtype, "cpu"), 5, heads, kv_heads, head_dim, normed)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a small vocabulary is several blocks: a large one takes the interpreter minutes."""
    monkeypatch.setattr(sampling, "BLOCK", 128)


@pytest.mark.parametrize("seed", range(12))
def test_draw(seed: int, small_blocks: Any) -> None:
    triton_cases.check_draw(seed, rows=2, vocab_size=[1, 90, 300][seed % 3], device="cpu")
