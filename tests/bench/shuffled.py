"""A checkpoint as it would be had nobody quantized it.

The only model at hand is one whose weights lie on a 4-bit grid, and quantizing them to that grid again costs nothing.
So its channels are put into another order, alike everywhere: what the model computes is the same, but every block of
weights is now made of others, of all scales, and no grid fits them better than it would any dense model's.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from engine.models.checkpoint import Checkpoint
from engine.models.expand import expanded
from engine.models.weights import Shapes, StoredTensor
from kernels.kinds import Indices


class Shuffled:
    """All of a checkpoint in bfloat16, vectors in float32."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._source, config = checkpoint.weights, checkpoint.config
        generator = np.random.default_rng(0)
        hidden = generator.permutation(config.hidden_size)
        inner = generator.permutation(config.intermediate_size)
        per_head = partial(_in_every_head, generator.permutation(config.head_dim))
        queries, values = per_head(config.num_heads), per_head(config.num_kv_heads)
        self._outputs = {"v_proj": values, "o_proj": hidden, "gate_proj": inner, "up_proj": inner, "down_proj": hidden}
        readers = ("embed_tokens", "lm_head", "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
        norms = ("input_layernorm", "post_attention_layernorm", "norm")
        self._inputs = {**dict.fromkeys((*readers, *norms), hidden), "o_proj": queries, "down_proj": inner}

    def shapes(self) -> Shapes:
        return self._source.shapes()

    def tensor(self, name: str) -> StoredTensor:
        stored = self._source.tensor(name)
        kind = "bfloat16" if len(stored.shape) == 2 else "float32"
        items = expanded(stored.rows, stored.format, kind)
        *_, part, suffix = name.split(".")
        outputs, inputs = self._outputs.get(part), self._inputs.get(part)
        if suffix == "bias":  # a vector, one number for each output
            outputs, inputs = None, outputs
        items = items if outputs is None else items[outputs]
        items = items if inputs is None else items[:, inputs]
        return StoredTensor(stored.shape, kind, np.ascontiguousarray(items).view(np.uint8))


def _in_every_head(order: Indices, num_heads: int) -> Indices:
    found: Indices = (np.arange(num_heads)[:, None] * len(order) + order).ravel()
    return found
