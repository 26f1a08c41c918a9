"""The native decoder: a loaded model's weights, packed for this processor, and its forward in one call."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from engine.attention.metadata import Batch
from engine.layers.linear import Linear
from engine.layers.norm import RMSNorm
from engine.layers.rotary import inverse_frequencies
from engine.models.config import ModelConfig
from engine.models.decoder import Decoder, DecoderLayer
from kernels.decoder import BatchIndices, DecoderShape, KVPool, LayerWeights
from kernels.decoder import Decoder as Kernel
from kernels.kinds import Floats, Items, Kind
from kernels.threads import set_threads
from kernels.weight import PackedWeight, pack_weight
from kvtransfer.layout import KVLayout

__all__ = ["NativeModel", "set_threads"]

KINDS: dict[torch.dtype, Kind] = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}


class NativeModel:
    """What a decoder computes: products of its dtype, float32 between them."""

    def __init__(self, decoder: Decoder) -> None:
        """Takes the decoder's weights out of it, layer by layer: memory never holds all of them twice."""
        self.config = decoder.config
        self.place = decoder.place
        self.num_parameters = decoder.num_parameters
        self.kind = KINDS[decoder.place.dtype]
        embedding = self._pack(decoder.embedding.weight)
        head = self._pack(decoder.head.weight) if decoder.head else embedding
        layers = [self._take(decoder.layers.pop(0)) for _ in range(len(decoder.layers))]
        self.kernel = Kernel(shape_of(decoder.config), embedding, layers, _floats(decoder.norm.weight), head)
        self._pool: KVPool | None = None

    def attach(self, layout: KVLayout, memory: memoryview) -> None:
        self._pool = KVPool(np.frombuffer(memory, np.uint8), self.kind, layout.block_size)

    def detach(self) -> None:
        self._pool = None

    def __call__(self, batch: Batch) -> Tensor:
        """Returns float32 whatever the dtype."""
        assert self._pool is not None, "attach a pool before executing"
        indices = BatchIndices(
            batch.tokens.numpy(), batch.starts, batch.context_lengths, batch.block_tables, batch.sampled.numpy()
        )
        return torch.from_numpy(self.kernel.forward(indices, self._pool))

    def _pack(self, weight: Tensor, gated: bool = False) -> PackedWeight:
        return pack_weight(_items(weight), self.kind, gated)

    def _take(self, layer: DecoderLayer) -> LayerWeights:
        attention, mlp = layer.attention, layer.mlp
        query_norm, key_norm = attention.norms or (None, None)
        return LayerWeights(
            attention_norm=_floats(layer.attention_norm.weight),
            qkv=self._pack(attention.qkv.weight),
            output=self._pack(attention.output.weight),
            mlp_norm=_floats(layer.mlp_norm.weight),
            gate_up=self._pack(mlp.gate_up.weight, gated=True),
            down=self._pack(mlp.down.weight),
            query_norm=_norm(query_norm),
            key_norm=_norm(key_norm),
            qkv_bias=_bias(attention.qkv),
            output_bias=_bias(attention.output),
            gate_up_bias=_bias(mlp.gate_up),
            down_bias=_bias(mlp.down),
        )


def shape_of(config: ModelConfig) -> DecoderShape:
    return DecoderShape(
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        vocab_size=config.vocab_size,
        epsilon=config.rms_eps,
        frequencies=inverse_frequencies(config.rope, config.head_dim).tolist(),
        windows=[window or 0 for window in config.windows],
        rotary_scale=config.rope.attention_factor,
    )


def _items(weight: Tensor) -> Items:
    """NumPy has no bfloat16: its bits."""
    items: Items = (weight.view(torch.uint16) if weight.dtype == torch.bfloat16 else weight).numpy()
    return items


def _floats(weight: Tensor) -> Floats:
    items: Floats = weight.float().numpy()
    return items


def _norm(norm: RMSNorm | None) -> Floats | None:
    return None if norm is None else _floats(norm.weight)


def _bias(linear: Linear) -> Floats | None:
    return None if linear.bias is None else _floats(linear.bias)
