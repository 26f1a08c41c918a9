"""Makes a checkpoint the torch decoder, ready to run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from engine.attention.pool import DTYPES
from engine.layers.placement import Placement
from engine.models.checkpoint import Checkpoint, open_checkpoint
from engine.models.decoder import Decoder
from engine.models.expand import Write, expand
from engine.models.place import choose_place
from kernels.kinds import Items, Kind

KINDS: dict[torch.dtype, Kind] = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}


def load_model(path: Path, dtype: str = "auto", device: str = "auto") -> Decoder:
    """`path` as `resolve.resolve` gives it. Raises ModelLoadError, saying what was expected."""
    place = choose_place(dtype, device)
    return decoder_of(open_checkpoint(path), Placement(DTYPES[place.dtype], torch.device(place.device)))


def decoder_of(checkpoint: Checkpoint, place: Placement) -> Decoder:
    decoder = Decoder(checkpoint.config, place)
    filled = [(checkpoint.weights.tensor(name), _writer(target)) for name, target in decoder.targets().items()]
    expand(filled, KINDS[place.dtype])
    return decoder


def _writer(target: Tensor) -> Write:
    """A write into a slice of the decoder's memory, wherever that is."""
    rows_of = target.view(-1, target.shape[-1])

    def write(rows: slice, items: Items) -> None:
        rows_of[rows].copy_(torch.from_numpy(np.require(items, requirements="W")).view(target.dtype))

    return write
