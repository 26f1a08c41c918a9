"""A loaded model over a KV pool: what the executor runs. Native kernels where they are, the torch decoder elsewhere."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from engine.attention.metadata import Batch
from engine.layers.placement import Placement
from engine.models.config import ModelConfig
from engine.models.decoder import Decoder
from engine.models.errors import ModelLoadError
from engine.run.torch_model import TorchModel
from kernels import cpu
from kvtransfer.layout import KVLayout

NATIVE_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")

log = logging.getLogger(__name__)


class RunnableModel(Protocol):
    config: ModelConfig
    place: Placement
    num_parameters: int

    def attach(self, layout: KVLayout, memory: memoryview) -> None:
        """Uses this memory, of the layout's size, as the KV pool; on CUDA one of the device's own."""

    def detach(self) -> None:
        """Lets go of the memory. Idempotent."""

    def __call__(self, batch: Batch) -> Tensor:
        """Stores the batch's KV; returns the logits of the rows that sample, [sampled rows, vocab], valid until the
        next call. A pool must be attached."""


def runnable(decoder: Decoder, num_threads: int | None, cpu_cores: Sequence[int]) -> RunnableModel:
    """The fastest that this machine has for the decoder, which is used up. `num_threads` None is one for each of
    `cpu_cores`, or for each core that this process may use. Raises ModelLoadError when a core is not one of these."""
    usable = sorted(os.sched_getaffinity(0))
    if stray := [core for core in cpu_cores if core not in usable]:
        raise ModelLoadError(f"this process may not use core {stray[0]}: expected some of {usable}")
    if not (cpu.NATIVE and decoder.place.device.type == "cpu" and decoder.config.family.name in NATIVE_FAMILIES):
        log.info("the forward is torch's: %s", cpu.REASON if not cpu.NATIVE else decoder.place.device)
        return _on_torch(decoder, num_threads, cpu_cores)
    from engine.run.native import NativeModel, set_threads  # needs the compiled module

    set_threads(num_threads or len(cpu_cores) or len(usable), cpu_cores)
    # Torch is left with the sampling: a second set of threads on the same cores would only take turns with ours.
    torch.set_num_threads(1)
    return NativeModel(decoder)


def _on_torch(decoder: Decoder, num_threads: int | None, cpu_cores: Sequence[int]) -> TorchModel:
    if cpu_cores:
        os.sched_setaffinity(0, cpu_cores)
    if num_threads or cpu_cores:
        torch.set_num_threads(num_threads or len(cpu_cores))
    return TorchModel(decoder)
