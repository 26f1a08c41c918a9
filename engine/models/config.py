"""The shape of a model, and how to read it from a Hugging Face config.json. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import log
from pathlib import Path
from typing import Any, Literal, cast, get_args

from engine.models.errors import ModelLoadError
from engine.models.families import Family, family_of_config

RopeKind = Literal["default", "linear", "llama3", "yarn"]
DEFAULT_ROPE_THETA = 10_000.0
DEFAULT_RMS_EPS = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """Rotary position embedding. Fields past `theta` mean something only for the kinds named beside them."""

    kind: RopeKind = "default"
    theta: float = DEFAULT_ROPE_THETA
    factor: float = 1.0  # linear, llama3, yarn
    original_max_positions: int = 0  # llama3, yarn
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float = 1.0  # yarn: cos and sin are multiplied by it
    truncate: bool = True  # yarn
    divisors: tuple[float, ...] = ()  # [head_dim / 2], GGUF's rope_freqs: inverse frequencies are divided by them


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Everything the decoder needs to know before it has weights."""

    family: Family
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    rms_eps: float
    rope: Rope
    tied_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    windows: tuple[int | None, ...]  # per layer: how many tokens back it sees, itself included; None: all
    eos_token_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        positive = ("hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim")
        for name in (*positive, "vocab_size", "max_positions"):
            if getattr(self, name) < 1:
                raise ModelLoadError(f"the model's {name} is {getattr(self, name)}: expected a positive number")
        if self.num_heads % self.num_kv_heads:
            raise ModelLoadError(f"{self.num_heads} heads cannot share {self.num_kv_heads} key-value heads evenly")
        if self.head_dim % 2:
            raise ModelLoadError(f"the model's head_dim is {self.head_dim}: rotary embeddings need an even number")


def read_config(directory: Path) -> ModelConfig:
    """From config.json (and generation_config.json for the EOS ids). Raises ModelLoadError."""
    config = _read_json(directory / "config.json")
    generation_path = directory / "generation_config.json"
    generation = _read_json(generation_path) if generation_path.is_file() else {}
    try:
        return _parse(config, generation)
    except KeyError as error:
        raise ModelLoadError(f"{directory / 'config.json'} lacks the field {error}") from error
    except (TypeError, AttributeError) as error:
        raise ModelLoadError(f"{directory / 'config.json'} has a field of the wrong type: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        parsed = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"cannot read {path}: {error}") from error
    if not isinstance(parsed, dict):
        raise ModelLoadError(f"{path} is not a JSON object")
    return parsed


def _parse(config: Mapping[str, Any], generation: Mapping[str, Any]) -> ModelConfig:
    family = family_of_config(config.get("architectures") or [], config.get("model_type", ""))
    _refuse_unknown_activation(config)
    num_heads = config["num_attention_heads"]
    attention_bias = bool(config.get("attention_bias", False))
    return ModelConfig(
        family=family,
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=num_heads,
        num_kv_heads=config.get("num_key_value_heads") or num_heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // num_heads,
        vocab_size=config["vocab_size"],
        max_positions=config["max_position_embeddings"],
        rms_eps=config.get("rms_norm_eps", DEFAULT_RMS_EPS),
        rope=_parse_rope(config),
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=attention_bias if family.qkv_bias is None else family.qkv_bias,
        output_bias=attention_bias if family.output_bias is None else family.output_bias,
        mlp_bias=bool(config.get("mlp_bias", False)) if family.mlp_bias is None else family.mlp_bias,
        windows=_parse_windows(config, family),
        eos_token_ids=_parse_eos(config, generation),
    )


def _refuse_unknown_activation(config: Mapping[str, Any]) -> None:
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise ModelLoadError(f"the model's hidden_act is {activation!r}; supported is silu")


def _parse_rope(config: Mapping[str, Any]) -> Rope:
    """Both spellings: today's `rope_parameters`, and `rope_theta` with `rope_scaling`."""
    fields = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    theta = float(fields.get("rope_theta") or config.get("rope_theta") or DEFAULT_ROPE_THETA)
    kind = fields.get("rope_type") or fields.get("type") or "default"
    if kind not in get_args(RopeKind):
        raise ModelLoadError(f"the model's rope_type is {kind!r}; supported are {', '.join(get_args(RopeKind))}")
    if float(fields.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0) != 1.0:
        raise ModelLoadError("the model rotates only a part of each head, which is not supported")
    if kind == "default":
        return Rope(theta=theta)
    factor = float(fields["factor"])
    original = fields.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
    return Rope(
        kind=cast(RopeKind, kind),
        theta=theta,
        factor=factor,
        original_max_positions=int(original or config["max_position_embeddings"]),
        low_freq_factor=float(fields.get("low_freq_factor") or 1.0),
        high_freq_factor=float(fields.get("high_freq_factor") or 4.0),
        beta_fast=float(fields.get("beta_fast") or 32.0),
        beta_slow=float(fields.get("beta_slow") or 1.0),
        attention_factor=yarn_attention_factor(factor, fields) if kind == "yarn" else 1.0,
        truncate=bool(fields.get("truncate", True)),
    )


def yarn_attention_factor(factor: float, fields: Mapping[str, Any]) -> float:
    """YaRN's temperature on the attention, as a factor on cos and sin (section 3.4 of arXiv:2309.00071)."""

    def scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * log(factor) + 1.0

    if fields.get("attention_factor") is not None:
        return float(fields["attention_factor"])
    if fields.get("mscale") and fields.get("mscale_all_dim"):
        return scale(fields["mscale"]) / scale(fields["mscale_all_dim"])
    return scale(1.0)


def _parse_windows(config: Mapping[str, Any], family: Family) -> tuple[int | None, ...]:
    num_layers: int = config["num_hidden_layers"]
    window: int | None = config.get("sliding_window")
    if family.sliding_window == "never" or window is None:
        return (None,) * num_layers
    if family.sliding_window == "always":
        return (window,) * num_layers
    if not config.get("use_sliding_window", False):
        return (None,) * num_layers
    kinds = config.get("layer_types")
    if kinds is not None:
        return tuple(window if kind == "sliding_attention" else None for kind in kinds)
    first = config.get("max_window_layers", num_layers)
    return tuple(window if layer >= first else None for layer in range(num_layers))


def _parse_eos(config: Mapping[str, Any], generation: Mapping[str, Any]) -> tuple[int, ...]:
    """generation_config.json wins: chat models list their end-of-turn tokens there alone."""
    found = generation.get("eos_token_id", config.get("eos_token_id"))
    if found is None:
        return ()
    return tuple(found) if isinstance(found, list) else (found,)
