"""Writes a transformers model as a GGUF file, as llama.cpp's converter does, with the gguf package's own writer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize
from numpy.typing import NDArray
from transformers import PreTrainedModel

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(
    model: PreTrainedModel, path: Path, quantized: Mapping[str, GGMLQuantizationType] | None = None, **extra: Any
) -> Path:
    """`quantized`: a GGUF tensor's short name (`ffn_up`) to its type, float32 where it has none. `extra`: metadata."""
    config, architecture = model.config, model.config.model_type
    writer = GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_eos_token_id(2)
    writer.add_eot_token_id(5)
    writer.add_token_list([b"word%d" % token for token in range(config.vocab_size)])
    for name, value in extra.items():
        writer.add_key_value(f"{architecture}.{name.replace('__', '.')}", *value)
    for name, tensor in tensors(model).items():
        kind = (quantized or {}).get(name.split(".")[-2])
        writer.add_tensor(name, tensor if kind is None else quantize(tensor, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tensors(model: PreTrainedModel) -> dict[str, NDArray[np.float32]]:
    config = model.config
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    found = {}
    for name, parameter in model.named_parameters():
        short, values = gguf_name(name), parameter.detach().numpy()
        part = short.split(".")[-2]
        found[short] = interleaved(values, heads[part]) if config.model_type == "llama" and part in heads else values
    return found


def gguf_name(name: str) -> str:
    stem, _, suffix = name.rpartition(".")
    if stem in NAMES:
        return f"{NAMES[stem]}.{suffix}"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{NAMES[part]}.{suffix}"


def interleaved(values: NDArray[np.float32], num_heads: int) -> NDArray[np.float32]:
    """Row by row: of each head, the first members of the rotary pairs to the even rows, the second ones to the odd."""
    rows = values.shape[0] // num_heads
    moved = np.empty_like(values)
    for row in range(values.shape[0]):
        head, inside = divmod(row, rows)
        second, pair = divmod(inside, rows // 2)
        moved[head * rows + 2 * pair + second] = values[row]
    return moved
