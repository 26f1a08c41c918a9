"""transformers' own arithmetic on our weights: what a Llama decoder of ours must compute."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from engine.models.decoder import Decoder


def llama_of(decoder: Decoder) -> LlamaForCausalLM:
    """In the decoder's dtype, on its device; shares its (dequantised) weights."""
    config = decoder.config
    shape = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        max_position_embeddings=config.max_positions,
        rms_norm_eps=config.rms_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope.theta},
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(shape)
    weights = dict(decoder.targets())
    model.load_state_dict({**weights, "lm_head.weight": weights["model.embed_tokens.weight"]}, assign=True)
    rotary = type(model.model.rotary_emb)(shape)  # its frequencies are no weights, and still on meta
    model.model.rotary_emb = rotary.to(weights["model.embed_tokens.weight"].device)
    return model.eval()
