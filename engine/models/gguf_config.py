"""The shape of a model, read from a GGUF file's metadata. Imports no torch."""

from __future__ import annotations

from typing import Any

import numpy as np

from engine.models.config import DEFAULT_RMS_EPS, DEFAULT_ROPE_THETA, ModelConfig, Rope, yarn_attention_factor
from engine.models.errors import ModelLoadError
from engine.models.families import family_of_gguf
from engine.models.gguf_file import GGUFFile

ROPE_FREQUENCIES = "rope_freqs.weight"
_END_TOKENS = ("eos_token_id", "eot_token_id", "eom_token_id")


def read_gguf_config(file: GGUFFile) -> ModelConfig:
    """Raises ModelLoadError when the architecture is unknown or a field that it needs is missing."""
    if file.metadata.get("split.count", 1) > 1:
        raise ModelLoadError(f"{file.path} is one part of a split GGUF: merge its parts with llama-gguf-split first")
    try:
        return _Metadata(file).config()
    except KeyError as error:
        raise ModelLoadError(f"{file.path} lacks {error}") from error
    except (TypeError, ArithmeticError) as error:
        raise ModelLoadError(f"{file.path} has metadata of the wrong kind: {error}") from error


class _Metadata:
    """Metadata keys are prefixed with the architecture's name: `llama.block_count`."""

    def __init__(self, file: GGUFFile) -> None:
        self.file = file
        self.architecture = str(file.metadata["general.architecture"])
        self.family = family_of_gguf(self.architecture)

    def config(self) -> ModelConfig:
        hidden_size, num_heads = self._field("embedding_length"), self._field("attention.head_count")
        num_layers, head_dim = self._field("block_count"), self._optional("attention.key_length", None)
        return ModelConfig(
            family=self.family,
            hidden_size=hidden_size,
            intermediate_size=self._field("feed_forward_length"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=self._optional("attention.head_count_kv", num_heads),
            head_dim=head_dim or hidden_size // num_heads,
            vocab_size=self.file.tensors["token_embd.weight"].shape[0],
            max_positions=self._field("context_length"),
            rms_eps=self._optional("attention.layer_norm_rms_epsilon", DEFAULT_RMS_EPS),
            rope=self._rope(),
            tied_embeddings="output.weight" not in self.file.tensors,
            qkv_bias="blk.0.attn_q.bias" in self.file.tensors,
            output_bias="blk.0.attn_output.bias" in self.file.tensors,
            mlp_bias="blk.0.ffn_gate.bias" in self.file.tensors,
            windows=self._windows(num_layers),
            eos_token_ids=self._eos(),
        )

    def _field(self, name: str) -> Any:
        return self.file.metadata[f"{self.architecture}.{name}"]

    def _optional(self, name: str, default: Any) -> Any:
        return self.file.metadata.get(f"{self.architecture}.{name}", default)

    def _rope(self) -> Rope:
        theta = float(self._optional("rope.freq_base", DEFAULT_ROPE_THETA))
        kind = self._optional("rope.scaling.type", "none")
        factor = float(self._optional("rope.scaling.factor", 1.0))
        original = int(self._optional("rope.scaling.original_context_length", self._field("context_length")))
        if kind == "none":
            return Rope(theta=theta, divisors=self._rope_divisors())
        if kind == "linear":
            return Rope(kind="linear", theta=theta, factor=factor)
        if kind == "yarn":
            scale = yarn_attention_factor(factor, {})
            return Rope(
                kind="yarn", theta=theta, factor=factor, original_max_positions=original, attention_factor=scale
            )
        raise ModelLoadError(f"{self.file.path} scales its rotary embedding by {kind!r}; supported are linear, yarn")

    def _rope_divisors(self) -> tuple[float, ...]:
        """llama.cpp bakes Llama 3's frequency scaling into a tensor of float32 divisors."""
        tensor = self.file.tensors.get(ROPE_FREQUENCIES)
        return tuple(tensor.rows.view(np.float32).ravel().tolist()) if tensor else ()

    def _windows(self, num_layers: int) -> tuple[int | None, ...]:
        window = self._optional("attention.sliding_window", 0)
        honoured = window and self.family.sliding_window != "never"
        return (window if honoured else None,) * num_layers

    def _eos(self) -> tuple[int, ...]:
        found = (self.file.metadata.get(f"tokenizer.ggml.{name}") for name in _END_TOKENS)
        return tuple(dict.fromkeys(token for token in found if token is not None))
