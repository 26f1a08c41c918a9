"""A quantized weight gives, bit for bit, the products of the same weights dequantized, rounded, and packed as dense."""

from __future__ import annotations

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize
from gguf.quants import quantize as gguf_quantize
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from kernels import cpu
from kernels.formats import BLOCKS, Format, Quantization, Quantized, row_items
from kernels.kinds import Floats, Items, Kind, narrowed, widened
from tests import lesser_isa

if not cpu.NATIVE:
    pytest.skip(cpu.REASON, allow_module_level=True)

from kernels import threads
from kernels.weight import PackedWeight, Part, embed, expand_rows, multiply, pack_parts, pack_weight, quantize

QUANTIZED: list[Quantized] = list(BLOCKS)
QUANTIZATIONS: list[Quantization] = ["q8_0", "q4_0", "q4_1"]
KINDS: list[Kind] = ["bfloat16", "float32"]
examples = settings(max_examples=lesser_isa.examples(40), deadline=None)
seeds = st.integers(0, 999)
formats = st.sampled_from(QUANTIZED)
kinds = st.sampled_from(KINDS)
counts = st.one_of(st.integers(1, 80), st.sampled_from([1, 8, 16, 17, 32, 33, 64]))


@pytest.fixture(autouse=True, scope="module")
def two_threads() -> None:
    threads.set_threads(2)


def columns_of(*some: Format) -> st.SearchStrategy[int]:
    length = max([BLOCKS[format].length for format in some if format in BLOCKS], default=1)
    return st.integers(1, 2 if length == 256 else 7).map(lambda blocks: blocks * length)


def random_rows(seed: int, format: Format, rows: int, columns: int) -> Items:
    """Any valid bytes: every code, every factor, and scales of both signs and all sizes, subnormal ones too."""
    random = np.random.default_rng(seed)
    if format == "float32" or format == "bfloat16" or format == "float16":
        return narrowed(random.standard_normal((rows, columns), np.float32), format)
    items = random.integers(0, 256, (rows, row_items(format, columns)), np.uint8)
    blocks = items.reshape(rows, -1, BLOCKS[format].num_bytes)
    for place in scale_places(format):
        scales = random.standard_normal(blocks.shape[:2]) * 2.0 ** random.integers(-24, 4, blocks.shape[:2])
        blocks[:, :, place : place + 2] = scales.astype(np.float16)[:, :, None].view(np.uint8)
    return items


def scale_places(format: Format) -> list[int]:
    if format == "q6_k":
        return [208]
    return [0, 2] if format in ("q4_1", "q5_1", "q4_k", "q5_k") else [0]


def dense(part: Part) -> Floats:
    if part.format == "float32" or part.format == "bfloat16" or part.format == "float16":
        return widened(part.items, part.format)
    items: Floats = dequantize(part.items, GGMLQuantizationType[part.format.upper()])
    return items


def pack_dense(parts: list[Part], kind: Kind, gated: bool = False) -> PackedWeight:
    return pack_weight(narrowed(np.concatenate([dense(part) for part in parts]), kind), kind, gated)


def assert_same_products(parts: list[Part], columns: int, kind: Kind, gated: bool, count: int) -> None:
    packed, expected = pack_parts(parts, columns, kind, gated), pack_dense(parts, kind, gated)
    items = np.random.default_rng(1).standard_normal((count, columns), np.float32)
    assert (packed.rows, packed.columns, packed.gated) == (expected.rows, expected.columns, gated)
    assert packed.input_kind == expected.input_kind
    assert_array_equal(multiply(items, packed), multiply(items, expected))


@settings(max_examples=lesser_isa.examples(120), deadline=None)
@given(st.data(), formats, kinds, st.integers(1, 70), counts, st.booleans(), seeds)
def test_products(
    data: st.DataObject, format: Quantized, kind: Kind, outputs: int, count: int, gated: bool, seed: int
) -> None:
    columns = data.draw(columns_of(format))
    part = Part(random_rows(seed, format, outputs * (1 + gated), columns), format)
    assert_same_products([part], columns, kind, gated, count)


@examples
@given(
    st.data(),
    st.lists(st.sampled_from([*QUANTIZED, "float32", "bfloat16", "float16"]), min_size=1, max_size=4),
    kinds,
    counts,
    seeds,
)
def test_parts_of_several_formats(data: st.DataObject, some: list[Format], kind: Kind, count: int, seed: int) -> None:
    columns = data.draw(columns_of(*some))
    sizes = data.draw(st.lists(st.one_of(st.integers(1, 40), st.just(64)), min_size=len(some), max_size=len(some)))
    parts = [
        Part(random_rows(seed + i, format, rows, columns), format)
        for i, (format, rows) in enumerate(zip(some, sizes, strict=True))
    ]
    assert_same_products(parts, columns, kind, False, count)


@examples
@given(st.data(), formats, formats, kinds, st.integers(1, 50), counts, seeds)
def test_gates_and_values_of_different_formats(
    data: st.DataObject, gates: Quantized, values: Quantized, kind: Kind, half: int, count: int, seed: int
) -> None:
    columns = data.draw(columns_of(gates, values))
    parts = [Part(random_rows(seed + i, format, half, columns), format) for i, format in enumerate((gates, values))]
    assert_same_products(parts, columns, kind, True, count)


@examples
@given(st.data(), formats, kinds, st.integers(1, 90), seeds)
def test_embedding(data: st.DataObject, format: Quantized, kind: Kind, outputs: int, seed: int) -> None:
    columns = data.draw(columns_of(format))
    part = Part(random_rows(seed, format, outputs, columns), format)
    ids = np.random.default_rng(seed).integers(0, outputs, 5)
    expected = widened(narrowed(dense(part), kind), kind)[ids]
    assert_array_equal(embed(ids, pack_parts([part], columns, kind)), expected)


@examples
@given(st.data(), formats, st.sampled_from([*KINDS, "float16"]), st.integers(1, 90), seeds)
def test_expanded_rows(data: st.DataObject, format: Quantized, kind: Kind, rows: int, seed: int) -> None:
    part = Part(random_rows(seed, format, rows, data.draw(columns_of(format))), format)
    assert_array_equal(expand_rows(part.items, format, kind), narrowed(dense(part), kind))


def test_half_a_block_is_not_expanded() -> None:
    with pytest.raises(ValueError, match="not whole blocks of q4_1"):
        expand_rows(np.zeros((2, 30), np.uint8), "q4_1", "float32")


@pytest.mark.parametrize("format", QUANTIZED)
def test_memory_is_about_what_a_file_takes(format: Quantized) -> None:
    items = random_rows(0, format, 96, 512)
    weights = [pack_parts([Part(items, format)], 512, "bfloat16") for _ in range(3)]
    assert [weight.num_bytes < items.nbytes * 1.03 for weight in weights] == [True] * 3


def test_a_weight_outlives_those_packed_beside_it() -> None:
    items = random_rows(0, "q4_0", 64, 64)
    first, second, third = (pack_parts([Part(items, "q4_0")], 64, "bfloat16") for _ in range(3))
    before = multiply(np.ones((1, 64), np.float32), second)
    del first, third
    assert_array_equal(multiply(np.ones((1, 64), np.float32), second), before)


@pytest.mark.parametrize("format", QUANTIZED)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_bad_scales_do_no_harm_to_other_rows(format: Quantized, bad: float) -> None:
    items = random_rows(0, format, 40, 256)
    good = multiply(np.ones((2, 256), np.float32), pack_parts([Part(items, format)], 256, "bfloat16"))
    for place in scale_places(format):
        items[7].reshape(-1, BLOCKS[format].num_bytes)[:, place : place + 2] = np.array([bad], np.float16).view(
            np.uint8
        )
    found = multiply(np.ones((2, 256), np.float32), pack_parts([Part(items, format)], 256, "bfloat16"))
    assert not np.isfinite(found[:, 7]).any()
    assert_array_equal(np.delete(found, 7, axis=1), np.delete(good, 7, axis=1))


def test_what_does_not_fit_is_refused() -> None:
    items = random_rows(0, "q4_0", 6, 64)
    with pytest.raises(ValueError, match="rows of 54 items"):
        pack_parts([Part(items, "q4_0")], 96, "bfloat16")
    with pytest.raises(ValueError, match="do not fill 40 columns"):
        pack_parts([Part(items, "q4_0")], 40, "bfloat16")
    with pytest.raises(TypeError, match="comes as uint8"):
        pack_parts([Part(items.view(np.int8), "q4_0")], 64, "bfloat16")
    with pytest.raises(ValueError, match="as many gates as values"):
        pack_parts([Part(items[:5], "q4_0")], 64, "bfloat16", gated=True)


@settings(max_examples=lesser_isa.examples(30), deadline=None)
@given(st.sampled_from(QUANTIZATIONS), st.integers(1, 9), st.integers(1, 9), st.floats(1e-3, 1e3), seeds)
def test_quantizing_leaves_no_larger_error_than_the_file_formats_own_way(
    format: Quantization, rows: int, blocks: int, spread: float, seed: int
) -> None:
    matrix = np.random.default_rng(seed).standard_normal((rows * 8, blocks * 32), np.float32) * np.float32(spread)
    kind = GGMLQuantizationType[format.upper()]
    ours, theirs = (dequantize(items, kind) for items in (quantize(matrix, format), gguf_quantize(matrix, kind)))
    assert np.square(ours - matrix).sum() <= np.square(theirs - matrix).sum() * 1.001


@pytest.mark.parametrize("format", QUANTIZATIONS)
@pytest.mark.parametrize("value", [0.0, 1.0, -3.5, 1e-30])
def test_equal_weights_stay_equal(format: Quantization, value: float) -> None:
    matrix = np.full((2, 64), value, np.float32)
    found = dequantize(quantize(matrix, format), GGMLQuantizationType[format.upper()])
    assert np.allclose(found, matrix, rtol=5e-3, atol=1e-7)


def test_blocks_fill_what_is_quantized() -> None:
    with pytest.raises(ValueError, match="do not fill 40 columns"):
        quantize(np.zeros((2, 40), np.float32), "q4_0")


@pytest.mark.parametrize("isa", lesser_isa.LESSER)
def test_every_lesser_instruction_set_of_this_machine(isa: str) -> None:
    lesser_isa.check(__file__, isa, "not lesser")
