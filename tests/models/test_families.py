"""Every family computes what transformers computes, however its tokens are cut into steps and batches."""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from forward import Forward
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import RECIPES, VOCAB_SIZE, make, save
from torch import Tensor
from torch.testing import assert_close
from transformers import PreTrainedModel

from engine.models.decoder import Decoder
from engine.models.load import load_model

RELATIVE, ABSOLUTE = 1e-4, 2e-5  # float32, sums in another order; logits are of the order of 1
PROMPT = [token * 31 % VOCAB_SIZE for token in range(70)]


@lru_cache
def reference(name: str) -> PreTrainedModel:
    return make(name)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("checkpoints")
    for name in RECIPES:
        save(reference(name), name, root / name)
    return root


@pytest.fixture(params=RECIPES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def forward(checkpoints: Path, name: str) -> Forward:
    return Forward(load_model(checkpoints / name, "float32", "cpu"))


def expected(name: str, tokens: list[int]) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = reference(name)(torch.tensor([tokens])).logits[0]
    return logits


def test_logits_are_those_of_transformers(name: str, forward: Forward) -> None:
    assert_close(forward.whole(PROMPT), expected(name, PROMPT), rtol=RELATIVE, atol=ABSOLUTE)


def test_token_by_token_is_the_same_as_all_at_once(name: str, forward: Forward) -> None:
    assert_close(forward.in_chunks(PROMPT, [1] * len(PROMPT)), expected(name, PROMPT), rtol=RELATIVE, atol=ABSOLUTE)


def test_a_prompt_then_decode_is_the_same_as_all_at_once(name: str, forward: Forward) -> None:
    assert_close(forward.in_chunks(PROMPT, [40, *[1] * 30]), expected(name, PROMPT), rtol=RELATIVE, atol=ABSOLUTE)


def test_a_mixed_batch_is_the_same_as_one_by_one(name: str, forward: Forward) -> None:
    prompts = [PROMPT[:23], PROMPT[20:21], PROMPT[5:60], PROMPT[30:34], PROMPT[:64], PROMPT[9:]]
    before = [11, 0, 54, 3, 0, 60]
    sequences = [forward.sequence(prompt) for prompt in prompts]
    started = [row for row, count in enumerate(before) if count]
    forward.step([sequences[row] for row in started], [before[row] for row in started])
    rest = [len(prompt) - count for prompt, count in zip(prompts, before, strict=True)]
    for logits, prompt, count in zip(forward.step(sequences, rest), prompts, before, strict=True):
        assert_close(logits, expected(name, prompt)[count:], rtol=RELATIVE, atol=ABSOLUTE)


def test_sharded_checkpoints_were_really_sharded(checkpoints: Path) -> None:
    for name, recipe in RECIPES.items():
        assert len(list((checkpoints / name).glob("*.safetensors"))) > 1 or recipe.max_shard_size == "50GB"


@settings(max_examples=30, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("windowed", ["llama", "mistral", "qwen2-windows"])
def test_any_split_of_a_prompt_gives_the_same_logits(checkpoints: Path, windowed: str, data: st.DataObject) -> None:
    length = data.draw(st.integers(1, len(PROMPT)))
    cuts = sorted(data.draw(st.sets(st.integers(1, length), max_size=6)) | {0, length})
    chunks = [end - start for start, end in pairwise(cuts)]
    forward = Forward(loaded(checkpoints / windowed), block_size=data.draw(st.sampled_from([1, 4, 16])))
    assert_close(
        forward.in_chunks(PROMPT[:length], chunks), forward.whole(PROMPT[:length]), rtol=RELATIVE, atol=ABSOLUTE
    )


@lru_cache
def loaded(path: Path) -> Decoder:
    return load_model(path, "float32", "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_device_computes_what_the_cpu_does(name: str, checkpoints: Path) -> None:
    forward = Forward(load_model(checkpoints / name, "float32", "cuda"))
    found = forward.in_chunks(PROMPT, [30, 1, 1, 37, 1]).cpu()
    assert_close(found, expected(name, PROMPT), rtol=1e-3, atol=1e-4)
