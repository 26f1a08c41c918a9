"""Where weights come from, and where they go: two sides that know nothing of each other but tensor names.

A decoder offers `targets`: for every tensor of its checkpoint, the slice of its own memory that the tensor belongs in
(a fused matrix offers one slice per part). A source fills them, converting to each target's dtype on the way.
Names are Hugging Face's, `model.layers.0.self_attn.q_proj.weight`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from engine.models.errors import ModelLoadError

Targets = Mapping[str, Tensor]


class WeightSource(Protocol):
    """One checkpoint, open for reading."""

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of every tensor in the checkpoint."""

    def fill(self, targets: Targets) -> None:
        """Writes each named tensor into its target; names and shapes have been checked. Raises ModelLoadError."""


def load_weights(source: WeightSource, targets: Targets) -> None:
    """Fills every target. Raises ModelLoadError when the checkpoint lacks one, or has it in another shape."""
    shapes = source.shapes()
    missing = [name for name in targets if name not in shapes]
    if missing:
        raise ModelLoadError(
            f"the checkpoint lacks {len(missing)} tensors that its config asks for, first {missing[0]}"
        )
    for name, target in targets.items():
        if tuple(target.shape) != shapes[name]:
            raise ModelLoadError(f"{name} has shape {shapes[name]} where the config says {tuple(target.shape)}")
    source.fill(targets)
