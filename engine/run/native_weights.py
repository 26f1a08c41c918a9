"""A checkpoint's weights, packed for this processor one by one, so that memory never holds all of them twice."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from engine.models.config import ModelConfig
from engine.models.expand import Write, expand, floats
from engine.models.weights import StoredTensor, WeightSource
from kernels.decoder import LayerWeights
from kernels.kinds import ITEM_TYPES, Floats, Items, Kind
from kernels.weight import PackedWeight, pack_weight

EMBEDDING, HEAD, LAST_NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


class NativeWeights:
    def __init__(self, source: WeightSource, config: ModelConfig, kind: Kind, cores: Collection[int] = ()) -> None:
        """`cores`: where threads that expand weights may run; none: where this one may."""
        self._source = source
        self._config = config
        self._kind = kind
        self._cores = cores

    def embedding(self) -> PackedWeight:
        return self._matrix([EMBEDDING])

    def head(self) -> PackedWeight:
        return self._matrix([HEAD])

    def last_norm(self) -> Floats:
        return self._vector(LAST_NORM)

    def layer(self, number: int) -> LayerWeights:
        config, prefix = self._config, f"model.layers.{number}."
        qkv = [f"{prefix}self_attn.{name}_proj" for name in "qkv"]
        output, down = [f"{prefix}self_attn.o_proj"], [f"{prefix}mlp.down_proj"]
        gate_up = [f"{prefix}mlp.gate_proj", f"{prefix}mlp.up_proj"]
        normed = config.family.qk_norm
        return LayerWeights(
            attention_norm=self._vector(f"{prefix}input_layernorm.weight"),
            qkv=self._matrix(_weights(qkv)),
            output=self._matrix(_weights(output)),
            mlp_norm=self._vector(f"{prefix}post_attention_layernorm.weight"),
            gate_up=self._matrix(_weights(gate_up), gated=True),
            down=self._matrix(_weights(down)),
            query_norm=self._vector(f"{prefix}self_attn.q_norm.weight") if normed else None,
            key_norm=self._vector(f"{prefix}self_attn.k_norm.weight") if normed else None,
            qkv_bias=self._bias(qkv) if config.qkv_bias else None,
            output_bias=self._bias(output) if config.output_bias else None,
            gate_up_bias=self._bias(gate_up) if config.mlp_bias else None,
            down_bias=self._bias(down) if config.mlp_bias else None,
        )

    def _matrix(self, names: Sequence[str], gated: bool = False) -> PackedWeight:
        """Matrices that read the same input, one above the other."""
        return pack_weight(self._stacked([self._source.tensor(name) for name in names]), self._kind, gated)

    def _stacked(self, parts: Sequence[StoredTensor]) -> Items:
        total = sum(len(part.rows) for part in parts)
        stacked = np.empty((total, parts[0].columns), ITEM_TYPES[self._kind])
        starts = np.cumsum([0, *(len(part.rows) for part in parts)])
        places = [stacked[start:] for start in starts[:-1]]
        expand(zip(parts, map(_writer, places), strict=True), self._kind, self._cores)
        return stacked

    def _vector(self, name: str) -> Floats:
        return floats(self._source.tensor(name))

    def _bias(self, names: Sequence[str]) -> Floats:
        return np.concatenate([self._vector(f"{name}.bias") for name in names])


def _weights(names: Sequence[str]) -> list[str]:
    return [f"{name}.weight" for name in names]


def _writer(place: Items) -> Write:
    def write(rows: slice, items: Items) -> None:
        place[rows.start : rows.start + len(items)] = items

    return write
