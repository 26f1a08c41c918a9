"""A whole decoder's forward in one native call. Native only: see kernels.cpu.NATIVE."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from kernels import _native
from kernels.kinds import Floats, Indices, Kind
from kernels.weight import PackedWeight


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderShape:
    """Of pre-norm layers of attention and gated MLP."""

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    epsilon: float  # of the norms
    frequencies: list[float]  # [head_dim / 2], radians per token of each rotary pair (i, i + head_dim / 2)
    windows: list[int]  # per layer, how many tokens back a token sees, itself included; 0: all
    rotary_scale: float = 1.0  # cosines and sines are multiplied by it
    score_scale: float | None = None  # None: 1 / sqrt(head_dim)
    score_soft_cap: float = 0.0  # 0: none
    logit_soft_cap: float = 0.0  # 0: none
    embedding_scale: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    """Of one layer. None where a model has none."""

    attention_norm: Floats  # [hidden]
    qkv: PackedWeight  # [query, key and value heads * head_dim, hidden]
    output: PackedWeight  # [hidden, query heads * head_dim]
    mlp_norm: Floats  # [hidden]
    gate_up: PackedWeight  # [2 * intermediate, hidden], gated
    down: PackedWeight  # [hidden, intermediate]
    query_norm: Floats | None = None  # [head_dim]
    key_norm: Floats | None = None  # [head_dim]
    qkv_bias: Floats | None = None
    output_bias: Floats | None = None
    gate_up_bias: Floats | None = None
    down_bias: Floats | None = None


@dataclass(frozen=True, slots=True)
class BatchIndices:
    """One step. Row i's tokens are [starts[i], starts[i + 1]): the last of its sequence's `lengths[i]`. Rows of one
    sequence stand next to one another, in its order."""

    tokens: Indices  # [tokens]
    starts: Indices  # [rows + 1]
    lengths: Indices  # [rows]
    block_tables: Indices  # [rows, most blocks], block ids in token order
    sampled: Indices  # [sampled]: which tokens' logits are wanted


@dataclass(frozen=True, slots=True)
class KVPool:
    """[block][layer][k|v][kv_head][token][dim]"""

    memory: memoryview | NDArray[np.uint8]  # writable bytes, whole blocks
    kind: Kind
    block_size: int  # tokens


class Decoder:
    """Weights, and the memory that a forward works in. One forward at a time."""

    def __init__(
        self,
        shape: DecoderShape,
        embedding: PackedWeight,  # [vocab, hidden]
        layers: list[LayerWeights],
        norm: Floats,  # [hidden]
        head: PackedWeight,  # [vocab, hidden], may be `embedding`
    ) -> None:
        """Raises ValueError where sizes do not fit together."""
        native = [_native_layer(layer) for layer in layers]
        self.shape = shape
        self._native = _native.Decoder(_native_shape(shape), embedding, native, norm, head)

    def forward(self, batch: BatchIndices, pool: KVPool) -> Floats:
        """Stores the batch's keys and values in the pool; returns the logits [sampled, vocab], valid until the next
        forward. Other Python threads run meanwhile. Raises ValueError, having done nothing, when an index lies outside
        what it points into."""
        return self._native.forward(
            batch.tokens,
            batch.starts,
            batch.lengths,
            batch.block_tables,
            batch.sampled,
            pool.memory,
            pool.kind,
            pool.block_size,
        )

    @property
    def num_bytes(self) -> int:
        """Of packed weights."""
        return self._native.num_bytes


def _native_shape(shape: DecoderShape) -> _native.DecoderShape:
    native = _native.DecoderShape()
    scale = shape.head_dim**-0.5 if shape.score_scale is None else shape.score_scale
    for field in fields(shape):
        setattr(native, field.name, getattr(shape, field.name) if field.name != "score_scale" else scale)
    return native


def _native_layer(layer: LayerWeights) -> _native.DecoderLayer:
    native = _native.DecoderLayer()
    for field in fields(layer):
        if (value := getattr(layer, field.name)) is not None:
            setattr(native, field.name, value)
    return native
