"""In which format each matrix is kept: what `--quantization` means."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast, get_args

from engine.models.errors import ModelLoadError
from kernels.formats import BLOCKS, Format, Quantization
from kernels.kinds import Kind

AUTO, NONE = "auto", "none"
OUTER: Quantization = "q8_0"  # of embedding and head: at 4 bits they cost more quality than all layers together


@dataclass(frozen=True, slots=True)
class WeightFormats:
    quantization: str  # auto, none, or what weights are quantized to
    kind: Kind  # of weights that are not

    def __post_init__(self) -> None:
        """Raises ModelLoadError for a quantization that nobody here knows."""
        known = (AUTO, NONE, *get_args(Quantization))
        if self.quantization not in known:
            raise ModelLoadError(f"unknown quantization {self.quantization!r}: expected {', '.join(known)}")

    @property
    def quantizes(self) -> bool:
        return self.quantization not in (AUTO, NONE)

    def kept(self, stored: str, outer: bool) -> Format:
        """Of a matrix that its checkpoint has as `stored`; `outer`: it is the embedding or the head."""
        if stored in BLOCKS:
            return self.kind if self.quantization == NONE else stored
        if stored not in get_args(Kind) or not self.quantizes:  # quantized in a way that no kernel knows, or dense
            return self.kind
        return OUTER if outer else cast(Quantization, self.quantization)
