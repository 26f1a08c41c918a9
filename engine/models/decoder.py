"""The one decoder: pre-norm layers of attention and gated MLP over a ragged batch. Inference only."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from engine.attention.backend import AttentionStep
from engine.attention.tensors import BatchTensors
from engine.layers.attention import Attention
from engine.layers.embedding import Embedding
from engine.layers.linear import Linear
from engine.layers.mlp import GatedMLP
from engine.layers.norm import RMSNorm
from engine.layers.placement import Placement
from engine.layers.rotary import RotaryEmbedding, Rotation
from engine.models.config import ModelConfig


class DecoderLayer:
    def __init__(self, config: ModelConfig, layer: int, place: Placement) -> None:
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_eps, place)
        self.attention = Attention(config, layer, place)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_eps, place)
        self.mlp = GatedMLP(config, place)

    def __call__(self, stream: Tensor, rotation: Rotation, step: AttentionStep) -> Tensor:
        """The residual stream [tokens, hidden], and what this layer adds to it. Adds in place."""
        stream += self.attention(self.attention_norm(stream), rotation, step)
        stream += self.mlp(self.mlp_norm(stream))
        return stream

    def targets(self, prefix: str) -> dict[str, Tensor]:
        return {
            **self.attention_norm.targets(f"{prefix}input_layernorm"),
            **self.attention.targets(f"{prefix}self_attn."),
            **self.mlp_norm.targets(f"{prefix}post_attention_layernorm"),
            **self.mlp.targets(f"{prefix}mlp."),
        }


class Decoder:
    """Weights and their arithmetic. Keeps nothing between calls: the KV lives in the pool behind the AttentionStep."""

    def __init__(self, config: ModelConfig, place: Placement) -> None:
        """Weights are unset until a checkpoint has filled `targets()`."""
        self.config = config
        self.place = place
        self.embedding = Embedding(config.vocab_size, config.hidden_size, place)
        self.rotary = RotaryEmbedding(config.rope, config.head_dim, place.device)
        self.layers = [DecoderLayer(config, layer, place) for layer in range(config.num_layers)]
        self.norm = RMSNorm(config.hidden_size, config.rms_eps, place)
        self.head = None if config.tied_embeddings else self._output_head()

    def _output_head(self) -> Linear:
        return Linear(self.config.hidden_size, {"lm_head": self.config.vocab_size}, False, self.place)

    @torch.inference_mode()
    def __call__(self, batch: BatchTensors, step: AttentionStep) -> Tensor:
        """Stores the batch's KV; returns the logits of the rows that sample: [sampled rows, vocab], in the model's
        dtype."""
        stream = self.embedding(batch.tokens)  # [tokens, hidden]
        rotation = self.rotary(batch.positions, self.place.dtype)
        for layer in self.layers:
            stream = layer(stream, rotation, step)
        hidden = self.norm(stream.index_select(0, batch.sampled))  # [sampled rows, hidden]
        return self.head(hidden) if self.head else self.embedding.project(hidden)

    def targets(self) -> Mapping[str, Tensor]:
        """Where each tensor of a checkpoint belongs, by its Hugging Face name; all of the decoder's weights."""
        named = {**self.embedding.targets("model.embed_tokens"), **self.norm.targets("model.norm")}
        for number, layer in enumerate(self.layers):
            named |= layer.targets(f"model.layers.{number}.")
        return named | (self.head.targets("") if self.head else {})

    @property
    def num_parameters(self) -> int:
        return sum(target.numel() for target in self.targets().values())
