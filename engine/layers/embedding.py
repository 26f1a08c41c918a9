"""Token ids to vectors."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from engine.layers.placement import Placement


class Embedding:
    def __init__(self, vocab_size: int, hidden_size: int, place: Placement) -> None:
        self.weight = place.empty(vocab_size, hidden_size)

    def __call__(self, tokens: Tensor) -> Tensor:
        """[tokens] to [tokens, hidden]."""
        return functional.embedding(tokens, self.weight)

    def project(self, hidden: Tensor) -> Tensor:
        """The same matrix as the output head of a model with tied embeddings: [tokens, hidden] to [tokens, vocab]."""
        return functional.linear(hidden, self.weight)

    def targets(self, name: str) -> dict[str, Tensor]:
        return {f"{name}.weight": self.weight}
