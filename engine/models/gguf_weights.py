"""Weights out of a GGUF file: dequantised row by row, straight into the decoder's memory."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize
from numpy.typing import NDArray

from engine.models.config import ModelConfig
from engine.models.errors import ModelLoadError
from engine.models.gguf_file import GGUFFile, GGUFTensor
from engine.models.weights import Targets

CHUNK_ITEMS = 1 << 18  # dequantised at a time: 1 MiB of float32, so that the passes over it stay in the cache
MAX_THREADS = 4

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

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self._tensors.items()}

    def fill(self, targets: Targets) -> None:
        chunks = [chunk for name, target in targets.items() for chunk in self._chunks(name, target)]
        with ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1)) as pool:
            list(pool.map(_Chunk.fill, chunks))  # the list raises here what a chunk raised there

    def _chunks(self, name: str, target: torch.Tensor) -> Iterator[_Chunk]:
        tensor = self._tensors[name]
        rows = self._ordered_rows(name, tensor)
        target = target.view(len(rows), -1)
        step = max(1, CHUNK_ITEMS // target.shape[-1])
        for start in range(0, len(rows), step):
            yield _Chunk(tensor.kind, rows[start : start + step], target[start : start + step])

    def _ordered_rows(self, name: str, tensor: GGUFTensor) -> NDArray[np.uint8]:
        if not self._config.family.gguf_interleaved:
            return tensor.rows
        if "self_attn.q_proj." in name:
            return undo_interleaving(tensor, self._config.num_heads)
        if "self_attn.k_proj." in name:
            return undo_interleaving(tensor, self._config.num_kv_heads)
        return tensor.rows


class _Chunk(NamedTuple):
    kind: GGMLQuantizationType
    rows: NDArray[np.uint8]  # [rows, bytes per row]
    target: torch.Tensor  # [rows, items per row]

    def fill(self) -> None:
        try:
            values = dequantize(self.rows, self.kind).astype(np.float32)  # also a copy, where it was a view of the file
        except NotImplementedError as error:
            raise ModelLoadError(
                f"the GGUF file holds {self.kind.name} tensors, which cannot be dequantised"
            ) from error
        self.target.copy_(torch.from_numpy(values))


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
