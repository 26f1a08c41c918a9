"""A checkpoint's tensors, as they lie in their files, and what a model's config asks of them. Imports no torch.

Names are Hugging Face's, `model.layers.0.self_attn.q_proj.weight`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from engine.models.config import ModelConfig
from engine.models.errors import ModelLoadError

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class StoredTensor:
    shape: tuple[int, ...]  # outputs first
    format: str  # of the bytes: float32, float16, bfloat16, or one of ggml's quantised ones in small letters: q4_1
    rows: NDArray[np.uint8]  # [rows, bytes per row]; a vector is one row. A view of the file wherever it can be

    @property
    def columns(self) -> int:
        return self.shape[-1]

    @property
    def num_items(self) -> int:
        return prod(self.shape)


class WeightSource(Protocol):
    """One checkpoint, open for reading."""

    def shapes(self) -> Shapes:
        """Of every tensor in the checkpoint."""

    def tensor(self, name: str) -> StoredTensor:
        """One of these. Raises ModelLoadError when its numbers are of a kind that cannot be read."""


def weight_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Of every tensor that the model is made of, in the order in which a forward meets them."""
    hidden = config.hidden_size
    named: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    layer = _layer_shapes(config)
    for number in range(config.num_layers):
        named |= {f"model.layers.{number}.{name}": shape for name, shape in layer.items()}
    named["model.norm.weight"] = (hidden,)
    return named if config.tied_embeddings else {**named, "lm_head.weight": (config.vocab_size, hidden)}


def _layer_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    hidden, inner, family = config.hidden_size, config.intermediate_size, config.family
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    head_norms = {f"self_attn.{name}_norm.weight": (config.head_dim,) for name in "qk"} if family.qk_norm else {}
    return {
        "input_layernorm.weight": (hidden,),
        **_linear("self_attn.q_proj", queries, hidden, config.qkv_bias),
        **_linear("self_attn.k_proj", keys, hidden, config.qkv_bias),
        **_linear("self_attn.v_proj", keys, hidden, config.qkv_bias),
        **_linear("self_attn.o_proj", hidden, queries, config.output_bias),
        **head_norms,
        "post_attention_layernorm.weight": (hidden,),
        **_linear("mlp.gate_proj", inner, hidden, config.mlp_bias),
        **_linear("mlp.up_proj", inner, hidden, config.mlp_bias),
        **_linear("mlp.down_proj", hidden, inner, config.mlp_bias),
    }


def _linear(name: str, outputs: int, inputs: int, bias: bool) -> dict[str, tuple[int, ...]]:
    weight: dict[str, tuple[int, ...]] = {f"{name}.weight": (outputs, inputs)}
    return {**weight, f"{name}.bias": (outputs,)} if bias else weight


def check_shapes(found: Shapes, wanted: Shapes) -> None:
    """Raises ModelLoadError when the checkpoint lacks a tensor, or has it in another shape."""
    missing = [name for name in wanted if name not in found]
    if missing:
        raise ModelLoadError(
            f"the checkpoint lacks {len(missing)} tensors that its config asks for, first {missing[0]}"
        )
    for name, shape in wanted.items():
        if found[name] != shape:
            raise ModelLoadError(f"{name} has shape {found[name]} where the config says {shape}")
