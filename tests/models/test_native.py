"""The native decoder is the torch decoder: every family, every cut of a prompt, every instruction set found here."""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from forward import Forward
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import RECIPES, VOCAB_SIZE, make, save
from torch import Tensor
from torch.testing import assert_close

from engine.attention.metadata import Batch, batch_of
from engine.core import Step
from engine.models.checkpoint import open_checkpoint
from engine.models.load import load_model
from engine.models.place import choose_place
from engine.models.resolve import resolve
from kernels import cpu
from tests import lesser_isa

if not cpu.NATIVE:
    pytest.skip(cpu.REASON, allow_module_level=True)

from engine.run.native import load_native
from kernels.threads import set_threads

TOLERANCE: dict[str, Any] = {"rtol": 1e-4, "atol": 2e-5}  # float32, sums in another order; logits are of the order of 1
COARSE: dict[str, Any] = {"rtol": 0.1, "atol": 0.25}  # bfloat16 keeps 8 bits, and the two round in different places
PROMPT = [token * 31 % VOCAB_SIZE for token in range(150)]
TEXT = [504, 2380, 282, 260, 905, 314, 260, 1379, 282, 1205, 1957, 28, 429, 260, 9036, 701, 288, 260, 1438, 1194]


class NativeForward(Forward):
    """The same pool, blocks and NaN in what was never written; the native decoder over them."""

    def __init__(self, path: Path, dtype: str, block_size: int) -> None:
        super().__init__(load_model(path, dtype, "cpu"), block_size)
        pool = self.attention.pool
        self.native = load_native(open_checkpoint(path), choose_place(dtype, "cpu"), num_threads=2)
        self.native.attach(pool.layout, pool.items.view(torch.uint8).numpy().data)

    def logits(self, batch: Batch) -> Tensor:
        return torch.from_numpy(self.native(batch).copy())


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("native")
    for name in RECIPES:
        save(make(name), name, root / name)
    return root


@pytest.fixture(params=RECIPES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(autouse=True)
def two_threads() -> None:
    set_threads(2)


def native(path: Path, dtype: str = "float32", block_size: int = 4) -> NativeForward:
    return NativeForward(path, dtype, block_size)


@lru_cache
def expected(path: Path, length: int) -> Tensor:
    return Forward(load_model(path, "float32", "cpu")).whole(PROMPT[:length])


def test_logits_are_those_of_torch(checkpoints: Path, name: str) -> None:
    whole = native(checkpoints / name).whole(PROMPT)
    assert_close(whole, expected(checkpoints / name, len(PROMPT)), **TOLERANCE)


def test_a_prompt_in_chunks_then_decode(checkpoints: Path, name: str) -> None:
    chunks = native(checkpoints / name).in_chunks(PROMPT, [67, 1, 40, 2, *[1] * 40])
    assert_close(chunks, expected(checkpoints / name, len(PROMPT)), **TOLERANCE)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_kinds_differ_by_rounding_alone(checkpoints: Path, name: str, dtype: str) -> None:
    forward = native(checkpoints / name, dtype, block_size=16)
    found = forward.in_chunks(PROMPT, [67, 1, 40, 2, *[1] * 40])
    assert_close(found, expected(checkpoints / name, len(PROMPT)), **COARSE)


def test_a_mixed_batch_is_the_same_as_one_by_one(checkpoints: Path, name: str) -> None:
    forward = native(checkpoints / name)
    lengths, before = [23, 1, 60, 34, 64, 9], [11, 0, 59, 3, 0, 8]
    rows = [forward.sequence(PROMPT[:length]) for length in lengths]
    started = [row for row, count in enumerate(before) if count]
    forward.step([rows[row] for row in started], [before[row] for row in started])
    rest = [length - count for length, count in zip(lengths, before, strict=True)]
    for logits, length, count in zip(forward.step(rows, rest), lengths, before, strict=True):
        assert_close(logits, expected(checkpoints / name, length)[count:], **TOLERANCE)


@settings(max_examples=15, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("windowed", ["llama", "mistral", "qwen2-windows"])
def test_any_split_of_a_prompt_gives_the_same_logits(checkpoints: Path, windowed: str, data: st.DataObject) -> None:
    length = data.draw(st.integers(1, len(PROMPT)))
    cuts = sorted(data.draw(st.sets(st.integers(1, length), max_size=6)) | {0, length})
    chunks = [end - start for start, end in pairwise(cuts)]
    forward = native(checkpoints / windowed, block_size=data.draw(st.sampled_from([1, 4, 16])))
    set_threads(data.draw(st.integers(1, 3)))
    assert_close(forward.in_chunks(PROMPT[:length], chunks), expected(checkpoints / windowed, length), **TOLERANCE)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_long_context_is_cut_along_its_keys(dtype: str) -> None:
    tokens = TEXT * 70
    forward = native(resolve("smollm2"), dtype, block_size=16)
    whole = forward.whole(tokens)[-1]
    row = forward.sequence(tokens)
    forward.step([row], [len(tokens) - 1])
    (alone,) = forward.step([row], [1])
    assert_close(alone[0], whole, rtol=1e-3, atol=2e-3 if dtype == "float32" else 0.3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("before", [1, 30, 1018], ids=["start", "block", "parts"])
def test_drafted_tokens_get_the_very_numbers_of_steps_of_their_own(before: int, dtype: str) -> None:
    """The tokens before them may end in another block, and in another number of parts."""
    forward, tokens = native(resolve("smollm2"), dtype, block_size=16), (TEXT * 60)[: before + 12]
    alone, drafted, other = forward.sequence(tokens), forward.sequence(tokens), forward.sequence(TEXT)
    for row in (alone, drafted):
        row.tokens = tokens[: before + 1]
        forward.step([row], [before])
    draft = {0: tokens[before + 1 :]}
    together = forward.logits(batch_of(Step([drafted], [1], draft), forward.block_size))
    accompanied = forward.logits(batch_of(Step([drafted, other], [1, 7], draft), forward.block_size))
    assert torch.equal(accompanied, together)
    for place in range(12):
        alone.tokens = tokens[: before + 1 + place]
        assert torch.equal(forward.step([alone], [1])[0][0], together[place])


def test_bfloat16_is_nearer_to_the_truth_than_torchs() -> None:
    truth = Forward(load_model(resolve("smollm2"), "float32", "cpu"), 16).whole(TEXT)
    ours = native(resolve("smollm2"), "bfloat16", block_size=16).whole(TEXT)
    theirs = Forward(load_model(resolve("smollm2"), "bfloat16", "cpu"), 16).whole(TEXT).float()
    assert (ours - truth).abs().mean() < (theirs - truth).abs().mean()
    assert (ours - truth).abs().mean() < 0.1


def test_greedy_text_is_torchs_token_for_token() -> None:
    def written(forward: Forward) -> list[int]:
        row = forward.sequence(TEXT + [0] * 60)
        row.tokens = list(TEXT)
        for _ in range(60):
            logits = forward.step([row], [row.num_missing])[0]
            row.tokens.append(int(logits[-1].argmax()))
        return row.tokens

    torchs = written(Forward(load_model(resolve("smollm2"), "float32", "cpu"), 16))
    assert written(native(resolve("smollm2"), block_size=16)) == torchs


def test_an_index_outside_is_refused_and_nothing_is_written(checkpoints: Path) -> None:
    forward = native(checkpoints / "llama")
    before = forward.attention.pool.items.clone()
    for block in (-1, forward.num_blocks, 2**40):
        row = forward.sequence(PROMPT[:9])
        row.block_table[1] = block
        with pytest.raises(ValueError, match=f"block of row 0 is out of range: {block}"):
            forward.step([row], [9])
    row = forward.sequence([0, VOCAB_SIZE])
    with pytest.raises(ValueError, match="token 1 is out of range"):
        forward.step([row], [2])
    assert torch.equal(before.isnan(), forward.attention.pool.items.isnan())


def test_a_lesser_instruction_set() -> None:
    """The kernels alone are held to their references on every one."""
    if "avx2" not in lesser_isa.LESSER:
        pytest.skip("this machine has none below its own that is made of lanes")
    lesser_isa.check(__file__, "avx2", "(mixed and (llama3 or qwen3 or biased)) or (drafted and float32)")
