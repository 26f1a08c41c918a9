"""FlashInfer over our pool is the reference attention: ragged mixes of decodes and chunks, windows, soft caps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tests.gpu.card import MISSING

if MISSING:
    pytest.skip(MISSING, allow_module_level=True)

from engine.attention.flashinfer import FlashInferAttention
from engine.attention.reference import ReferenceAttention
from engine.attention.staging import Staging
from kernels.reference_attention import attend
from tests.gpu.ragged import NUM_LAYERS, Ragged, Shape

pytestmark = pytest.mark.gpu

TOLERANCE = {"bfloat16": 2e-2, "float16": 3e-3}  # of outputs of about 1, rounded to the dtype

SHAPES = [
    Shape("bfloat16", kv_heads=3, share=3, head_dim=64),
    Shape("float16", kv_heads=2, share=1, head_dim=64, block_size=1),
    Shape("bfloat16", kv_heads=8, share=4, head_dim=128, block_size=32),
    Shape("bfloat16", kv_heads=2, share=7, head_dim=128),
]
MIXES = {
    "decodes": ([0, 5, 63, 200, 1500], [1] * 5),
    "chunks": ([0, 0, 16, 700], [1 + 6, 300, 33, 64]),
    "both": ([4, 100, 0, 31, 900], [1, 40, 17, 1, 128]),
    "one row": ([0], [1]),
}


def attention_of(ragged: Ragged, windows: list[int | None], soft_cap: float = 0.0) -> FlashInferAttention:
    staging = Staging(torch.device("cuda", 0), 1 << 10)  # small, so that it must grow
    return FlashInferAttention(ragged.pool, ragged.shape.num_heads, windows, staging, soft_cap)


def attended(attention: FlashInferAttention, ragged: Ragged, layer: int) -> Tensor:
    with attention.staging.step():
        step = attention.plan(ragged.batch)
    return step.attend(layer, ragged.queries, ragged.keys, ragged.values)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("windows", [[None, None], [None, 20], [1, 64]], ids=str)
def test_attention_is_the_reference(shape: Shape, mix: str, windows: list[int | None]) -> None:
    ragged = Ragged(shape, *MIXES[mix], seed=len(mix))
    attention = attention_of(ragged, windows)
    step = ReferenceAttention(ragged.wide_pool, windows).plan(ragged.batch)
    for layer in range(NUM_LAYERS):
        found = attended(attention, ragged, layer)
        wide = (ragged.queries.float(), ragged.keys.float(), ragged.values.float())
        tolerance = TOLERANCE[shape.dtype]
        assert_close(found.float(), step.attend(layer, *wide), rtol=tolerance, atol=tolerance)
    assert torch.equal(ragged.pool.items.float(), ragged.wide_pool.items)  # both have stored the same and no more


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("window", [None, 20])
def test_soft_caps(mix: str, window: int | None) -> None:
    shape = SHAPES[0]
    ragged = Ragged(shape, *MIXES[mix], seed=3)
    ragged.queries.mul_(20)  # scores far beyond the cap
    layout, batch = ragged.pool.layout, ragged.batch
    pool = ragged.wide_pool.items.view(
        layout.num_blocks, NUM_LAYERS, 2, layout.num_kv_heads, layout.block_size, layout.head_dim
    )
    found = attended(attention_of(ragged, [window] * NUM_LAYERS, soft_cap=10.0), ragged, layer=1)
    expected = attend(
        ragged.queries.float().cpu().numpy(),
        ragged.keys.float().cpu().numpy(),
        ragged.values.float().cpu().numpy(),
        batch.starts,
        batch.context_lengths,
        batch.block_tables,
        pool.cpu().numpy(),
        "float32",
        layer=1,
        soft_cap=10.0,
        window=window or 0,
    )
    flat = torch.from_numpy(expected.reshape(len(expected), -1))
    assert_close(found.float().cpu(), flat, rtol=2e-2, atol=2e-2)


def test_plans_of_one_step_do_not_outlive_it() -> None:
    """The same wrappers serve every step: planned anew, through memory that the last step's copies have left."""
    shape = SHAPES[0]
    first, second = Ragged(shape, [500] * 4, [1] * 4, seed=1), Ragged(shape, [3, 40], [1, 9], seed=2)
    attention = attention_of(first, [None, None])
    for ragged in (first, second, first):
        attention.layers = attention_of(ragged, [None, None]).layers
        found = attended(attention, ragged, layer=0)
        wide = (ragged.queries.float(), ragged.keys.float(), ragged.values.float())
        expected = ReferenceAttention(ragged.wide_pool, [None, None]).plan(ragged.batch).attend(0, *wide)
        assert_close(found.float(), expected, rtol=2e-2, atol=2e-2)
    assert np.array_equal(first.batch.num_new, [1, 1, 1, 1])
