"""The table of model families that the one decoder runs. A new family is a row; what differs is data, not code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from engine.models.errors import ModelLoadError

# never: full attention in every layer · always: `sliding_window`, when it is set, holds for every layer
# by_flag: only with `use_sliding_window`, and only in the layers that `layer_types` or `max_window_layers` name
SlidingWindow = Literal["never", "always", "by_flag"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How one family differs from the plain pre-norm, gated-MLP, rotary decoder."""

    name: str
    architecture: str  # the entry of `architectures` in a Hugging Face config.json
    model_type: str  # the same file's `model_type`
    gguf_architecture: str | None  # `general.architecture` of a GGUF file
    gguf_interleaved: bool = False  # the GGUF's q and k rows are ordered for interleaved rotary pairs
    qkv_bias: bool | None = None  # None: the config's `attention_bias` says
    output_bias: bool | None = False
    mlp_bias: bool | None = False  # None: the config's `mlp_bias` says
    qk_norm: bool = False  # RMS norm over each head of q and k, before rotation
    sliding_window: SlidingWindow = "never"


FAMILIES = (
    Family(
        name="llama",
        architecture="LlamaForCausalLM",
        model_type="llama",
        gguf_architecture="llama",
        gguf_interleaved=True,
        output_bias=None,
        mlp_bias=None,
    ),
    # llama.cpp writes Mistral as "llama", so a GGUF of it comes in through the row above.
    Family(
        name="mistral",
        architecture="MistralForCausalLM",
        model_type="mistral",
        gguf_architecture=None,
        qkv_bias=False,
        sliding_window="always",
    ),
    Family(
        name="qwen2",
        architecture="Qwen2ForCausalLM",
        model_type="qwen2",
        gguf_architecture="qwen2",
        qkv_bias=True,
        sliding_window="by_flag",
    ),
    Family(
        name="qwen3",
        architecture="Qwen3ForCausalLM",
        model_type="qwen3",
        gguf_architecture="qwen3",
        output_bias=None,
        qk_norm=True,
        sliding_window="by_flag",
    ),
)


def family_of_config(architectures: list[str], model_type: str) -> Family:
    """The row for a config.json. Raises ModelLoadError naming what is supported."""
    for family in FAMILIES:
        if family.architecture in architectures or (not architectures and family.model_type == model_type):
            return family
    found = ", ".join(architectures) or model_type or "nothing"
    expected = ", ".join(family.architecture for family in FAMILIES)
    raise ModelLoadError(f"config.json names the architecture {found}; supported are {expected}")


def family_of_gguf(architecture: str) -> Family:
    """The row for a GGUF file. Raises ModelLoadError naming what is supported."""
    for family in FAMILIES:
        if family.gguf_architecture == architecture:
            return family
    expected = ", ".join(family.gguf_architecture for family in FAMILIES if family.gguf_architecture)
    raise ModelLoadError(f"the GGUF file's general.architecture is {architecture!r}; supported are {expected}")
