"""Tiny random models of every family, made by transformers and saved as users' checkpoints are."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCAB_SIZE = 97
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "eos_token_id": [2, 5],
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 64}


@dataclass(frozen=True)
class Recipe:
    model: type[PreTrainedModel]
    config: type[PreTrainedConfig]
    differs: dict[str, Any] = field(default_factory=dict)
    max_shard_size: str = "50GB"


RECIPES = {
    "llama": Recipe(LlamaForCausalLM, LlamaConfig),
    "llama-tied": Recipe(LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": True}),
    "llama-biased": Recipe(LlamaForCausalLM, LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "llama3-rope": Recipe(LlamaForCausalLM, LlamaConfig, {"rope_parameters": LLAMA3_ROPE}, max_shard_size="30KB"),
    "yarn-rope": Recipe(LlamaForCausalLM, LlamaConfig, {"rope_parameters": YARN_ROPE}),
    "linear-rope": Recipe(
        LlamaForCausalLM, LlamaConfig, {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}
    ),
    "mistral": Recipe(MistralForCausalLM, MistralConfig, {"sliding_window": 9, "head_dim": 16}),
    "qwen2": Recipe(Qwen2ForCausalLM, Qwen2Config, max_shard_size="30KB"),
    "qwen2-windows": Recipe(
        Qwen2ForCausalLM, Qwen2Config, {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}
    ),
    "qwen3": Recipe(Qwen3ForCausalLM, Qwen3Config, {"head_dim": 32}),
    "wide": Recipe(  # rows of whole quantisation blocks
        LlamaForCausalLM,
        LlamaConfig,
        {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 96, "num_hidden_layers": 1},
    ),
    "one-kv-head": Recipe(LlamaForCausalLM, LlamaConfig, {"num_key_value_heads": 1}),
}


def make(name: str) -> PreTrainedModel:
    """Random in everything, norms and biases included: a forgotten one must show."""
    recipe = RECIPES[name]
    config = recipe.config(**{**SHAPE, **recipe.differs}, attn_implementation="eager")
    generator = torch.Generator().manual_seed(0)
    model = recipe.model(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.3 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, spread, generator=generator)
    return model


def save(model: PreTrainedModel, name: str, directory: Path) -> Path:
    model.save_pretrained(directory, max_shard_size=RECIPES[name].max_shard_size)
    return directory
