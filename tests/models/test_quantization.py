"""Quantized weights: what a file holds stays packed, what it has dense can be quantized, what cannot be is refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf_checkpoint import write_gguf
from numpy.testing import assert_allclose
from small_models import make, save

from engine.attention.metadata import Batch
from engine.models.checkpoint import Checkpoint, open_checkpoint
from engine.models.config import ModelConfig
from engine.models.errors import ModelLoadError
from engine.models.place import Place
from engine.models.resolve import resolve
from engine.run.model import load_runnable
from engine.run.weight_formats import WeightFormats
from kernels import cpu
from kernels.kinds import Floats, Kind
from kvtransfer.layout import KVLayout

if not cpu.NATIVE:
    pytest.skip(cpu.REASON, allow_module_level=True)

from engine.run.native import NativeModel, load_native

PROMPT = [token * 31 % 97 for token in range(40)]
PARTS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_up", "ffn_gate", "ffn_down", "token_embd", "output")
Q = GGMLQuantizationType
MIXED = {"attn_q": Q.Q4_0, "attn_v": Q.Q5_1, "output": Q.F16}


def native(checkpoint: Checkpoint, quantization: str, dtype: Kind = "bfloat16") -> NativeModel:
    return load_native(checkpoint, Place(dtype, "cpu"), 2, quantization=quantization)


def logits(model: NativeModel, tokens: list[int]) -> Floats:
    """[tokens, vocab], in a pool of one block."""
    config, count = model.config, len(tokens)
    model.attach(pool := one_block(config, count, model.place.dtype), memoryview(bytearray(pool.pool_bytes)))
    every, length, table = np.arange(count), np.array([count]), np.zeros((1, 1), np.int64)
    return model(Batch(np.array(tokens), every, np.array([0, count]), length, table, count)).copy()


def one_block(config: ModelConfig, block_size: int, dtype: str) -> KVLayout:
    return KVLayout(
        num_blocks=1,
        block_size=block_size,
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        dtype=dtype,
    )


def quantized_file(directory: Path, quantized: Mapping[str, GGMLQuantizationType]) -> Checkpoint:
    return open_checkpoint(write_gguf(make("wide"), directory / "model.gguf", quantized))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "mixed"])
def test_packed_weights_compute_exactly_what_expanded_ones_do(kind: str, dtype: Kind, tmp_path: Path) -> None:
    quantized = MIXED if kind == "mixed" else dict.fromkeys(PARTS, Q[kind])
    checkpoint = quantized_file(tmp_path, quantized)
    packed, expanded = native(checkpoint, "auto", dtype), native(checkpoint, "none", dtype)
    assert expanded.quantization == "none"
    assert packed.quantization == ("q4_0+q5_1" if kind == "mixed" else kind.lower())
    assert np.array_equal(logits(packed, PROMPT), logits(expanded, PROMPT))


def test_packed_weights_come_near_expanded_ones_in_float16(tmp_path: Path) -> None:
    """Not exactly: expanded ones have been rounded to float16, packed ones have not."""
    checkpoint = quantized_file(tmp_path, dict.fromkeys(PARTS, Q.Q5_1))
    packed, expanded = native(checkpoint, "auto", "float16"), native(checkpoint, "none", "float16")
    assert_allclose(logits(packed, PROMPT), logits(expanded, PROMPT), atol=5e-3)


def test_the_bundled_model_is_exactly_its_expanded_self() -> None:
    checkpoint = open_checkpoint(resolve("smollm2"))
    packed, expanded = (native(checkpoint, quantization) for quantization in ("auto", "none"))
    assert packed.quantization == "q4_1+q8_0"
    assert np.array_equal(logits(packed, PROMPT), logits(expanded, PROMPT))


@pytest.mark.parametrize(("quantization", "apart"), [("q8_0", 0.05), ("q4_1", 0.25), ("q4_0", 0.3)])
def test_dense_weights_are_quantized(quantization: str, apart: float, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save(make("wide"), "wide", tmp_path))
    dense, found = native(checkpoint, "auto", "float32"), native(checkpoint, quantization, "float32")
    assert dense.quantization == "none"
    assert found.quantization.split("+")[0] in (quantization, "q8_0")  # embedding and head keep 8 bits
    difference = logits(found, PROMPT) - logits(dense, PROMPT)
    assert 0 < np.linalg.norm(difference) / np.linalg.norm(logits(dense, PROMPT)) < apart


def test_a_file_that_is_quantized_already_is_not_quantized_again(tmp_path: Path) -> None:
    checkpoint = quantized_file(tmp_path, dict.fromkeys(PARTS, Q.Q4_0))
    with pytest.raises(ModelLoadError, match=r"quantized already \(q4_0\): use auto"):
        native(checkpoint, "q8_0")


def test_rows_that_are_no_whole_blocks_are_refused(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save(make("llama"), "llama", tmp_path))  # 48 columns
    with pytest.raises(ModelLoadError, match=r"embed_tokens\.weight cannot be quantized: .* blocks of 32 "):
        native(checkpoint, "q8_0")


def test_an_unknown_quantization_is_refused() -> None:
    with pytest.raises(ModelLoadError, match="unknown quantization 'int3': expected auto, none, q8_0"):
        WeightFormats("int3", "bfloat16")


def test_without_native_kernels_nothing_is_quantized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = save(make("wide"), "wide", tmp_path)
    monkeypatch.setattr(cpu, "NATIVE", False)
    with pytest.raises(ModelLoadError, match="q8_0 needs the native kernels"):
        load_runnable(directory, "float32", "cpu", quantization="q8_0")
    assert load_runnable(directory, "float32", "cpu").quantization == "none"


@pytest.mark.parametrize(
    ("stored", "quantization", "outer", "kept"),
    [
        ("q4_k", "auto", False, "q4_k"),
        ("q4_k", "none", False, "bfloat16"),
        ("iq2_xs", "auto", False, "bfloat16"),  # no kernel reads it
        ("iq2_xs", "q8_0", False, "bfloat16"),
        ("float16", "auto", False, "bfloat16"),
        ("float32", "q4_0", False, "q4_0"),
        ("float32", "q4_0", True, "q8_0"),
        ("q4_1", "q8_0", False, "q4_1"),
    ],
)
def test_what_a_matrix_is_kept_as(stored: str, quantization: str, outer: bool, kept: str) -> None:
    assert WeightFormats(quantization, "bfloat16").kept(stored, outer) == kept
