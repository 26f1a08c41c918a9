"""The model on the card: a graph's replay computes what the kernels compute one by one, and writes where they write."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tests.gpu.card import MISSING

if MISSING:
    pytest.skip(MISSING, allow_module_level=True)

from engine.attention.metadata import Batch, batch_of
from engine.core import Request, SamplingParams, Sequence, Step
from engine.models.checkpoint import open_checkpoint
from engine.models.place import Place
from engine.models.resolve import resolve
from engine.run.cuda import CudaModel
from engine.run.torch_model import TorchModel
from engine.sampling.sampler import sample
from kvtransfer.layout import KVLayout
from tests.cluster.prompts import prompt_of

pytestmark = pytest.mark.gpu

NUM_BLOCKS, BLOCK_SIZE = 500, 16
MOST_ROWS = 12  # no power of two, so the last rung is odd
LOGITS = 0.5  # what float16 may move of logits that reach 35: on a CPU torch's own is 0.24 off its float32
PICKED = 0.05  # … of probabilities: there 0.02


@pytest.fixture(scope="module")
def model() -> Iterator[CudaModel]:
    loaded = CudaModel(open_checkpoint(resolve("smollm2")), Place("float16", "cuda"), MOST_ROWS)
    loaded.attach(layout(loaded), memoryview(b""))
    yield loaded
    loaded.detach()


@pytest.fixture(scope="module")
def plain() -> TorchModel:
    """The same weights in plain torch, in float32."""
    loaded = TorchModel(open_checkpoint(resolve("smollm2")), Place("float32", "cuda"))
    loaded.attach(layout(loaded), memoryview(b""))
    return loaded


def layout(model: CudaModel | TorchModel) -> KVLayout:
    config = model.config
    return KVLayout(
        num_blocks=NUM_BLOCKS,
        block_size=BLOCK_SIZE,
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        dtype=model.place.dtype,
    )


def rows_of(lengths: list[int], **wishes: float) -> list[Sequence]:
    """Sequences of which nothing is computed yet. The last one holds block 0, which spare rows read."""
    free = iter(range(NUM_BLOCKS - 1, 0, -1))
    rows = []
    for index, length in enumerate(lengths):
        sampling = SamplingParams(max_tokens=50, seed=index, **wishes)  # type: ignore[arg-type]
        row = Sequence.of(Request(id=str(index), prompt=prompt_of(length), sampling=sampling), arrival=0.0)
        row.block_table = [next(free) for _ in range(-(-length // BLOCK_SIZE))]
        rows.append(row)
    rows[-1].block_table[0] = 0
    return rows


def batch_for(rows: list[Sequence], num_new: list[int]) -> Batch:
    return batch_of(Step(rows, num_new), BLOCK_SIZE)


def advance(models: list[CudaModel | TorchModel], rows: list[Sequence], num_new: list[int]) -> list[Tensor]:
    batch = batch_for(rows, num_new)
    logits = [model(batch).clone() for model in models]
    for row, count in zip(rows, num_new, strict=True):
        row.num_computed += count
    return logits


def pool_of(model: CudaModel) -> Tensor:
    """[block, layer, k|v, kv_head, token, dim]"""
    assert model._attention is not None
    keys, _ = model._attention.layers[0]
    config = model.config
    shape = (NUM_BLOCKS, config.num_layers, 2, config.num_kv_heads, BLOCK_SIZE, config.head_dim)
    return keys.as_strided(shape, torch.empty(shape, device="meta").stride(), 0)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8, 11, 12])
def test_a_graph_computes_what_the_kernels_do(model: CudaModel, count: int) -> None:
    rows = rows_of([7 + 97 * index for index in range(count)])
    for row in rows:
        advance([model], [row], [row.num_missing - 1])
    batch = batch_for(rows, [1] * count)
    expected = model.compute(batch).float()
    found = model.replay(batch).float()
    assert_close(found, expected, rtol=0, atol=LOGITS)
    assert_close(found.softmax(-1), expected.softmax(-1), rtol=0, atol=PICKED)
    again = model.replay(batch).float()
    assert torch.equal(found, again)


def test_spare_rows_write_nowhere(model: CudaModel) -> None:
    rows = rows_of([40, 17, 33])
    for row in rows:
        advance([model], [row], [row.num_missing - 1])
    before = pool_of(model).clone()
    batch = batch_for(rows, [1, 1, 1])  # takes the graph of 4
    model.replay(batch)
    changed = (pool_of(model) != before).any(-1).any(3).any(2).any(1)  # [blocks, tokens]
    slots = set(torch.nonzero(changed.flatten()).flatten().tolist())
    assert slots <= set(batch.slots.tolist())
    assert slots


def test_steps_of_every_kind_give_the_logits_of_plain_torch(model: CudaModel, plain: TorchModel) -> None:
    """Chunks that sample and chunks that do not, a row of one token between them, decodes of more rows than a graph."""
    rows = rows_of([60, 200, 33, 300, *[20 + index for index in range(MOST_ROWS)]])
    mixes: list[tuple[list[Sequence], list[int]]] = [
        (rows[:2], [58, 150]),
        ([rows[1], rows[0], rows[2]], [49, 1, 33]),
        (rows[3:], [row.num_missing - 1 for row in rows[3:]]),
        ([*rows[:2], *rows[3:]], [1] * (len(rows) - 1)),
    ]
    num_sampled = []
    for some, num_new in mixes:
        found, expected = advance([model, plain], some, num_new)
        num_sampled.append(len(found))
        assert_close(found.float(), expected, rtol=0, atol=LOGITS)
    assert num_sampled == [0, 1, 0, MOST_ROWS + 3]


@pytest.mark.parametrize(
    "wishes",
    [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 0.7, "top_p": 0.9, "top_k": 40, "min_p": 0.01},
        {"temperature": 1.3, "top_p": 0.5, "repetition_penalty": 1.2, "frequency_penalty": 0.3},
    ],
    ids=str,
)
def test_the_tokens_are_those_of_the_torch_sampler(model: CudaModel, wishes: dict[str, float]) -> None:
    rows = rows_of([30 + index for index in range(MOST_ROWS)], **wishes)
    logits = advance([model], rows, [row.num_missing for row in rows])[0]
    assert model.sample(logits, rows).tokens == sample(logits.float(), rows).tokens


def test_logprobs_come_along(model: CudaModel) -> None:
    rows = rows_of([30, 31], temperature=0.0, logprobs=3)
    logits = advance([model], rows, [row.num_missing for row in rows])[0]
    for found, expected in zip(model.sample(logits, rows).logprobs, sample(logits, rows).logprobs, strict=True):
        assert found is not None
        assert expected is not None
        assert found.top_ids == expected.top_ids
