"""What the decoder asks of attention. The torch reference and the compiled kernels both answer to this."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from engine.attention.metadata import Batch


class AttentionStep(Protocol):
    """Attention over one batch: whatever depends on the batch alone has been worked out already."""

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Stores keys and values [tokens, kv_heads, head_dim] in the pool, then attends with queries [tokens, heads,
        head_dim], each causally over its own sequence. Returns [tokens, heads * head_dim]."""


class AttentionBackend(Protocol):
    def plan(self, batch: Batch) -> AttentionStep: ...
