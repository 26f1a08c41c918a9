"""Weights out of a GGUF file, under Hugging Face's names and in its order. Imports no torch."""

from __future__ import annotations

import numpy as np
from gguf.constants import GGMLQuantizationType
from numpy.typing import NDArray

from engine.models.config import ModelConfig
from engine.models.gguf_file import GGUFFile, GGUFTensor
from engine.models.weights import Shapes, StoredTensor

DENSE = {
    GGMLQuantizationType.F32: "float32",
    GGMLQuantizationType.F16: "float16",
    GGMLQuantizationType.BF16: "bfloat16",
}
_OUTER_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class GGUFWeights:
    def __init__(self, file: GGUFFile, config: ModelConfig) -> None:
        self._config = config
        named = ((_hugging_face_name(tensor.name), tensor) for tensor in file.tensors.values())
        self._tensors = {name: tensor for name, tensor in named if name}

    def shapes(self) -> Shapes:
        return {name: tensor.shape for name, tensor in self._tensors.items()}

    def tensor(self, name: str) -> StoredTensor:
        tensor = self._tensors[name]
        stored = DENSE.get(tensor.kind, tensor.kind.name.lower())
        return StoredTensor(tensor.shape, stored, self._ordered_rows(name, tensor))

    def _ordered_rows(self, name: str, tensor: GGUFTensor) -> NDArray[np.uint8]:
        if not self._config.family.gguf_interleaved:
            return tensor.rows
        if "self_attn.q_proj." in name:
            return undo_interleaving(tensor, self._config.num_heads)
        if "self_attn.k_proj." in name:
            return undo_interleaving(tensor, self._config.num_kv_heads)
        return tensor.rows


def undo_interleaving(tensor: GGUFTensor, num_heads: int) -> NDArray[np.uint8]:
    """q's or k's rows in Hugging Face's order. Rows are quantised one by one, so they move whole, as bytes.

    Of each head llama.cpp stores the rotary pairs side by side, (0, d/2), (1, d/2 + 1), …; Hugging Face stores all
    first members, then all second ones.
    """
    rows = tensor.rows.reshape(tensor.shape[0], -1)  # a bias is one row of items: each item is a row here
    pairs = rows.reshape(num_heads, -1, 2, rows.shape[1])  # [heads, dim / 2, 2, bytes]
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(tensor.rows.shape)


def _hugging_face_name(name: str) -> str | None:
    """None for tensors that the decoder computes itself, such as rotary frequencies."""
    stem, _, suffix = name.rpartition(".")
    if not stem.startswith("blk."):
        return f"{_OUTER_NAMES[stem]}.{suffix}" if stem in _OUTER_NAMES else None
    _, layer, part = stem.split(".", 2)
    return f"model.layers.{layer}.{_LAYER_NAMES[part]}.{suffix}" if part in _LAYER_NAMES else None
