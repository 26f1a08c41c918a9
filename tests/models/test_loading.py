"""A model on native kernels is loaded without torch and without a second copy of its weights."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from small_models import RECIPES, make, save

from engine.layers.placement import Placement
from engine.models.checkpoint import open_checkpoint
from engine.models.decoder import Decoder
from engine.models.errors import ModelLoadError
from engine.models.expand import expanded
from engine.models.safetensors_file import SafetensorsFile
from engine.models.weights import weight_shapes
from kernels import cpu
from kernels.kinds import widened

needs_native = pytest.mark.skipif(not cpu.NATIVE, reason=cpu.REASON)
LOAD = """
import sys, tracemalloc
from engine.run.local import LocalExecutor
tracemalloc.start()
executor = LocalExecutor("smollm2", dtype="bfloat16", device="cpu", quantization=sys.argv[1])
peak_bytes = tracemalloc.get_traced_memory()[1]
executor.attach(bytearray(executor.layout(1).pool_bytes))
executor.warm_up()
print(peak_bytes, *(name for name in ("torch", "transformers") if name in sys.modules))
"""
LARGEST_BYTES = 49152 * 576 * 2  # the embedding, in bfloat16
LOAD_S = 120.0


def loaded(quantization: str) -> list[str]:
    """Of a process that loads the bundled model and runs a step: its peak of bytes in Python's hands (not the native
    kernels'), then which of torch and transformers it has imported."""
    command = [sys.executable, "-c", LOAD, quantization]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=LOAD_S).stdout.split()


@needs_native
@pytest.mark.parametrize(("quantization", "most_bytes"), [("auto", 16 << 20), ("none", LARGEST_BYTES + (16 << 20))])
def test_loading_holds_one_matrix_at_a_time_and_imports_no_torch(quantization: str, most_bytes: int) -> None:
    peak_bytes, *imported = loaded(quantization)
    assert imported == []
    assert int(peak_bytes) < most_bytes


@pytest.mark.parametrize("name", RECIPES)
def test_the_shapes_that_a_config_asks_for_are_those_of_the_decoder(name: str, tmp_path: Path) -> None:
    config = open_checkpoint(save(make(name), name, tmp_path)).config
    decoder = Decoder(config, Placement(torch.float32, torch.device("meta")))
    assert weight_shapes(config) == {name: tuple(target.shape) for name, target in decoder.targets().items()}


def test_a_safetensors_file_reads_as_the_package_wrote_it(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    torch.manual_seed(0)
    written = {str(dtype): torch.randn(5, 7).to(dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16)}
    written["vector"] = torch.randn(9)
    save_file(written, path, metadata={"format": "pt"})
    file = SafetensorsFile(path)
    assert file.shapes == {name: tuple(tensor.shape) for name, tensor in written.items()}
    for name, tensor in written.items():
        stored = file.tensor(name)
        items = expanded(stored.rows, stored.format, "float32").reshape(stored.shape)
        assert np.array_equal(items, tensor.float().numpy())
    rounded = expanded(file.tensor("torch.float32").rows, "float32", "bfloat16")
    assert np.array_equal(widened(rounded, "bfloat16"), written["torch.float32"].bfloat16().float().numpy())


def test_numbers_that_are_no_floats_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"ids": torch.arange(4)}, path)
    with pytest.raises(ModelLoadError, match="has ids as I64; read are F32, F16, BF16"):
        SafetensorsFile(path).tensor("ids")


@pytest.mark.parametrize(
    "info",
    [
        {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 12]},
        {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 1 << 40]},
        {"dtype": "F32", "shape": [2, 2], "data_offsets": [-16, 0]},
        {"dtype": "F32", "shape": [2, 2]},
        {"dtype": "F32", "shape": 4, "data_offsets": [0, 16]},
        {"dtype": ["F32"], "shape": [2, 2], "data_offsets": [0, 16]},
        [],
    ],
)
def test_a_header_that_lies_is_refused(info: object, tmp_path: Path) -> None:
    header = json.dumps({"weight": info}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    with pytest.raises(ModelLoadError, match=r"model\.safetensors"):
        SafetensorsFile(path).tensor("weight")


def test_a_safetensors_file_with_a_wild_header_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.randn(4, 4), "bias": torch.randn(4)}, path)
    honest = path.read_bytes()
    generator = np.random.default_rng(0)
    for _ in range(300):
        bent = bytearray(honest)
        for place in generator.integers(0, 140, 4):
            bent[place] = generator.integers(0, 256)
        path.write_bytes(bent)
        with suppress(ModelLoadError):  # nothing else may come out, and some bent files are still whole
            file = SafetensorsFile(path)
            for name in file.shapes:
                file.tensor(name)
