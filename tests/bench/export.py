"""Writes a GGUF model as a Hugging Face directory, for peers that read no GGUF: the very same weights, in bfloat16.

python -m tests.bench.export /tmp/smollm2-bf16
"""

from __future__ import annotations

import argparse
from pathlib import Path

from safetensors.torch import save_file
from transformers import GenerationConfig, LlamaConfig, PreTrainedConfig, PreTrainedTokenizerFast

from engine.models.config import ModelConfig
from engine.models.gguf_header import read_header
from engine.models.load import load_model
from engine.models.resolve import resolve
from engine.text.sources import from_gguf


def export(model: str, directory: Path) -> None:
    """`model` names a GGUF file of the Llama family. Overwrites what is in `directory`. Raises ModelLoadError."""
    path = resolve(model)
    if not path.is_file() or read_header(path).metadata["general.architecture"] != "llama":
        raise ValueError(f"{path} is no GGUF file of the Llama family: serve it by the peer's own tools, and by URL")
    decoder = load_model(path, "bfloat16", "cpu")
    directory.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.contiguous() for name, tensor in decoder.targets().items()}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    text = from_gguf(path)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=text.backend, chat_template=text.chat_template, **text.named_tokens
    )
    tokenizer.save_pretrained(directory)
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    described(decoder.config, special).save_pretrained(directory)
    GenerationConfig(**special).save_pretrained(directory)


def described(config: ModelConfig, special: dict[str, int | None]) -> PreTrainedConfig:
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_positions,
        rms_norm_eps=config.rms_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope.theta},
        tie_word_embeddings=config.tied_embeddings,
        **special,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="where to write")
    parser.add_argument("--model", default="smollm2", help="a GGUF file or a bundled name (default: %(default)s)")
    args = parser.parse_args()
    export(args.model, args.directory)


if __name__ == "__main__":
    main()
