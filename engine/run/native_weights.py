"""A checkpoint's weights, packed for this processor one by one, so that memory never holds all of them twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from typing import cast

import numpy as np

from engine.models.config import ModelConfig
from engine.models.errors import ModelLoadError
from engine.models.expand import Write, expand, floats
from engine.models.weights import StoredTensor, WeightSource
from engine.run.weight_formats import NONE, WeightFormats
from kernels.decoder import LayerWeights
from kernels.formats import BLOCKS, Format, Quantization, item_type, row_items
from kernels.kinds import Floats, Items, Kind
from kernels.weight import PackedWeight, Part, pack_parts, quantize

EMBEDDING, HEAD, LAST_NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


class NativeWeights:
    def __init__(
        self, source: WeightSource, config: ModelConfig, formats: WeightFormats, cores: Collection[int] = ()
    ) -> None:
        """`cores`: where threads that expand weights may run; none: where this one may."""
        self._num_weights: Counter[Format] = Counter()  # packed so far, by the format they are kept in
        self._num_bytes = 0  # of what is packed
        self._num_quantized = 0  # of these, by us
        self._source = source
        self._config = config
        self._formats = formats
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

    def check_quantized(self) -> None:
        """Once all is packed. Raises ModelLoadError when the user asked to quantize and there was nothing to."""
        if self._formats.quantizes and not self._num_quantized:
            raise ModelLoadError(
                f"--quantization {self._formats.quantization} quantizes dense weights, and this checkpoint's are "
                f"quantized already ({self.quantization()}): use auto, which keeps them, or none, which expands them"
            )

    def quantization(self) -> str:
        """The quantized formats of what is packed, most weights first: `q4_1+q8_0`, or none."""
        return "+".join(name for name, _ in self._num_weights.most_common() if name in BLOCKS) or NONE

    def summary(self) -> str:
        shares = (f"{count / 1e6:.0f} million in {name}" for name, count in self._num_weights.most_common())
        return f"{self._num_bytes / 1e6:.0f} MB: {', '.join(shares)}"

    def _matrix(self, names: Sequence[str], gated: bool = False) -> PackedWeight:
        """Matrices that read the same input, one above the other."""
        stored = [self._source.tensor(name) for name in names]
        parts, columns = list(map(self._part, names, stored)), stored[0].columns
        packed = pack_parts(parts, columns, self._formats.kind, gated)
        self._num_bytes += packed.num_bytes
        return packed

    def _part(self, name: str, stored: StoredTensor) -> Part:
        kept = self._formats.kept(stored.format, outer=name in (EMBEDDING, HEAD))
        self._num_weights[kept] += stored.num_items
        if kept == stored.format:
            return Part(stored.rows.view(item_type(kept)), kept)
        try:
            items = np.empty((len(stored.rows), row_items(kept, stored.columns)), item_type(kept))
        except ValueError as error:
            raise ModelLoadError(f"{name} cannot be quantized: {error}; use --quantization none or auto") from error
        self._convert(stored, kept, items)
        return Part(items, kept)

    def _convert(self, stored: StoredTensor, kept: Format, items: Items) -> None:
        if kept in BLOCKS:
            self._num_quantized += stored.num_items
            expand([(stored, _quantizer(items, cast(Quantization, kept)))], "float32", self._cores)
        else:
            expand([(stored, _writer(items))], cast(Kind, kept), self._cores)

    def _vector(self, name: str) -> Floats:
        return floats(self._source.tensor(name))

    def _bias(self, names: Sequence[str]) -> Floats:
        return np.concatenate([self._vector(f"{name}.bias") for name in names])


def _weights(names: Sequence[str]) -> list[str]:
    return [f"{name}.weight" for name in names]


def _writer(place: Items) -> Write:
    def write(rows: slice, items: Items) -> None:
        place[rows] = items

    return write


def _quantizer(place: Items, format: Quantization) -> Write:
    def write(rows: slice, items: Items) -> None:
        place[rows] = quantize(items, format)

    return write
