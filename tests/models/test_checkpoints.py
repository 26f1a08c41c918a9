"""Checkpoints are read as they were written, and what cannot be read is refused with what was expected."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forward import Forward
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType
from gguf_checkpoint import write_gguf
from small_models import LLAMA3_ROPE, make, save
from torch.testing import assert_close

from engine.models.checkpoint import open_checkpoint
from engine.models.config import read_config
from engine.models.errors import ModelLoadError
from engine.models.gguf_file import read_gguf
from engine.models.load import load_model
from engine.models.place import choose_place
from engine.models.resolve import resolve
from engine.models.rotary import inverse_frequencies

PROMPT = [7, 3, 90, 11, 11, 0, 42, 8, 1, 64]


@pytest.mark.parametrize("name", ["llama", "llama-tied", "llama-biased", "qwen2", "qwen3", "one-kv-head"])
def test_a_gguf_file_computes_what_its_model_does(name: str, tmp_path: Path) -> None:
    model = make(name)
    forward = Forward(load_model(write_gguf(model, tmp_path / "model.gguf"), "float32", "cpu"))
    with torch.inference_mode():
        expected = model(torch.tensor([PROMPT])).logits[0]
    assert_close(forward.whole(PROMPT), expected, rtol=1e-4, atol=2e-5)
    assert forward.decoder.config.eos_token_ids == (2, 5)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_1"])
def test_quantised_tensors_come_near_their_originals(kind: str, tmp_path: Path) -> None:
    model = make("wide")
    packed = dict.fromkeys(("attn_q", "attn_k", "ffn_up", "token_embd"), GGMLQuantizationType[kind])
    decoder = load_model(write_gguf(model, tmp_path / "model.gguf", packed), "float32", "cpu")
    originals = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for name, found in decoder.targets().items():
        apart = float((found - originals[name]).norm() / originals[name].norm())
        assert apart < 0.12, name


def test_bfloat16_weights_are_the_rounded_float32_ones(tmp_path: Path) -> None:
    path = write_gguf(make("llama"), tmp_path / "model.gguf")
    precise, rounded = load_model(path, "float32", "cpu"), load_model(path, "bfloat16", "cpu")
    for (_, wide), (_, narrow) in zip(precise.targets().items(), rounded.targets().items(), strict=True):
        assert torch.equal(wide.bfloat16(), narrow)


def test_the_header_reads_as_the_gguf_package_reads_it(tmp_path: Path) -> None:
    path = write_gguf(make("qwen3"), tmp_path / "model.gguf", {"ffn_up": GGMLQuantizationType.F16})
    ours, theirs = read_gguf(path), GGUFReader(path)
    fields = {name: field.contents() for name, field in theirs.fields.items() if not name.startswith("GGUF.")}
    assert ours.metadata == fields
    assert set(ours.tensors) == {tensor.name for tensor in theirs.tensors}
    for tensor in theirs.tensors:
        found = ours.tensors[tensor.name]
        assert (found.shape, found.kind) == (tuple(reversed(tensor.shape.tolist())), tensor.tensor_type)
        assert np.array_equal(found.rows.ravel(), tensor.data.view(np.uint8).ravel())


@pytest.mark.parametrize("keep", [0, 3, 4, 20, 200, 2000, -100])
def test_a_cut_gguf_file_is_refused(keep: int, tmp_path: Path) -> None:
    path = write_gguf(make("llama"), tmp_path / "model.gguf")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelLoadError, match="not a readable GGUF file"):
        load_model(path, "float32", "cpu")


def test_a_gguf_file_with_a_wild_header_is_refused(tmp_path: Path) -> None:
    path = write_gguf(make("llama"), tmp_path / "model.gguf")
    honest = path.read_bytes()
    generator = np.random.default_rng(0)
    for _ in range(200):
        bent = bytearray(honest)
        for place in generator.integers(0, 1500, 8):
            bent[place] = generator.integers(0, 256)
        path.write_bytes(bent)
        with suppress(ModelLoadError):  # nothing else may come out, and some bent files are still whole
            open_checkpoint(path)


def test_a_scaled_rope_is_read_from_gguf(tmp_path: Path) -> None:
    text, number = GGUFValueType.STRING, GGUFValueType.FLOAT32
    scaling: dict[str, Any] = {"rope__scaling__type": ("linear", text), "rope__scaling__factor": (4.0, number)}
    config = open_checkpoint(write_gguf(make("llama"), tmp_path / "model.gguf", **scaling)).config
    assert (config.rope.kind, config.rope.factor) == ("linear", 4.0)
    unknown = write_gguf(make("llama"), tmp_path / "unknown.gguf", rope__scaling__type=("su", text))
    with pytest.raises(ModelLoadError, match="supported are linear, yarn"):
        open_checkpoint(unknown)


def test_both_spellings_of_rope_in_config_json_mean_the_same(tmp_path: Path) -> None:
    directory = save(make("llama3-rope"), "llama3-rope", tmp_path)
    new = read_config(directory).rope
    old = json.loads((directory / "config.json").read_text())
    rope = old.pop("rope_parameters")
    theta = rope.pop("rope_theta")
    (directory / "config.json").write_text(json.dumps(old | {"rope_scaling": rope, "rope_theta": theta}))
    assert read_config(directory).rope == new
    assert new.factor == LLAMA3_ROPE["factor"]
    assert inverse_frequencies(new, 8)[-1] < inverse_frequencies(new, 8)[0]


def test_a_generation_config_names_the_end_tokens(tmp_path: Path) -> None:
    directory = save(make("llama"), "llama", tmp_path)
    assert read_config(directory).eos_token_ids == (2, 5)
    (directory / "generation_config.json").write_text('{"eos_token_id": 9}')
    assert read_config(directory).eos_token_ids == (9,)


def change_config(directory: Path, **changes: Any) -> None:
    config = json.loads((directory / "config.json").read_text()) | changes
    (directory / "config.json").write_text(json.dumps({name: value for name, value in config.items() if value != "-"}))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel; supported are LlamaForCausalLM"),
        ({"hidden_size": "-"}, "lacks the field 'hidden_size'"),
        ({"num_attention_heads": "six"}, "wrong type"),
        ({"num_key_value_heads": 4}, "cannot share 4"),
        ({"head_dim": 7}, "even number"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"hidden_act": "gelu"}, "supported is silu"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "supported are default, linear, llama3, yarn"),
        ({"rope_parameters": {"rope_type": "linear"}}, "lacks the field 'factor'"),
        ({"num_hidden_layers": 4}, "lacks 9 tensors"),
        ({"intermediate_size": 64}, "has shape"),
    ],
)
def test_a_config_that_cannot_be_run_is_refused(changes: dict[str, Any], expected: str, tmp_path: Path) -> None:
    directory = save(make("llama"), "llama", tmp_path)
    change_config(directory, **changes)
    with pytest.raises(ModelLoadError, match=expected):
        load_model(directory, "float32", "cpu")


def test_broken_directories_are_refused(tmp_path: Path) -> None:
    directory = save(make("qwen2"), "qwen2", tmp_path)
    index, shard = directory / "model.safetensors.index.json", sorted(directory.glob("*.safetensors"))[1]
    honest, weights = index.read_text(), shard.read_bytes()
    shard.write_bytes(weights[:100])
    with pytest.raises(ModelLoadError, match=shard.name):
        load_model(directory, "float32", "cpu")
    shard.unlink()
    with pytest.raises(ModelLoadError, match=shard.name):
        load_model(directory, "float32", "cpu")
    index.write_text(honest.replace(shard.name, "../elsewhere.safetensors"))
    with pytest.raises(ModelLoadError, match="not a file beside it"):
        load_model(directory, "float32", "cpu")
    index.unlink()
    with pytest.raises(ModelLoadError, match=r"holds neither model\.safetensors nor"):
        load_model(directory, "float32", "cpu")
    (directory / "config.json").write_text("{")
    with pytest.raises(ModelLoadError, match="cannot read"):
        load_model(directory, "float32", "cpu")


@pytest.mark.parametrize(("dtype", "device"), [("int8", "cpu"), ("auto", "tpu"), ("auto", "cuda")])
def test_an_unknown_place_is_refused(dtype: str, device: str) -> None:
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(ModelLoadError, match="expected"):
        choose_place(dtype, device)


def test_errors_of_finding_and_of_loading_are_one_kind(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError):
        resolve(str(tmp_path / "nothing"))
