"""A loaded model over a KV pool: what the executor runs. Native kernels where they are, the torch decoder elsewhere."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from engine.attention.metadata import Batch
from engine.core import Row, StepOutput
from engine.models.checkpoint import Checkpoint, open_checkpoint
from engine.models.config import ModelConfig
from engine.models.errors import ModelLoadError
from engine.models.place import Place, choose_place
from engine.run.weight_formats import AUTO, WeightFormats
from kernels import cpu
from kvtransfer.layout import KVLayout

NATIVE_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")

Logits = Any  # [sampled rows, vocab]: an array or a tensor, each model's own

log = logging.getLogger(__name__)


class RunnableModel(Protocol):
    config: ModelConfig
    place: Place
    quantization: str  # formats of the quantized weights, joined by +, or none
    draft_rows: int  # see Executor

    def attach(self, layout: KVLayout, memory: memoryview) -> None:
        """Uses this memory, of the layout's size, as the KV pool; on CUDA one of the device's own."""

    def detach(self) -> None:
        """Lets go of the memory. Idempotent."""

    def __call__(self, batch: Batch) -> Logits:
        """Stores the batch's KV; returns the logits of the rows that sample, [sampled rows, vocab], valid until the
        next call. A pool must be attached."""

    def sample(self, logits: Logits, rows: Sequence[Row]) -> StepOutput:
        """A token for each row, out of what `__call__` has just returned for it."""


def load_runnable(
    path: Path,
    dtype: str = "auto",
    device: str = "auto",
    num_threads: int | None = None,
    cpu_cores: Sequence[int] = (),
    max_num_seqs: int = 64,
    quantization: str = AUTO,
) -> RunnableModel:
    """The fastest that this machine has for the model at `path`. `num_threads` None is one for each of `cpu_cores`, or
    for each core that this process may use. A step has at most `max_num_seqs` rows. `quantization`: see
    `WeightFormats`. Raises ModelLoadError, also when a core is not one of these."""
    usable = sorted(os.sched_getaffinity(0))
    if stray := [core for core in cpu_cores if core not in usable]:
        raise ModelLoadError(f"this process may not use core {stray[0]}: expected some of {usable}")
    place, checkpoint = choose_place(dtype, device), open_checkpoint(path)
    native = cpu.NATIVE and place.device == "cpu" and checkpoint.config.family.name in NATIVE_FAMILIES
    if not native:
        _refuse_quantizing(WeightFormats(quantization, place.dtype))
    if place.device_type == "cuda":
        return _on_cuda(checkpoint, place, num_threads, cpu_cores, max_num_seqs)
    if not native:
        log.info("the forward is torch's: %s", checkpoint.config.family.name if cpu.NATIVE else cpu.REASON)
        return _on_torch(checkpoint, place, num_threads, cpu_cores)
    from engine.run.native import load_native  # needs the compiled module

    return load_native(checkpoint, place, num_threads or len(cpu_cores) or len(usable), cpu_cores, quantization)


def _refuse_quantizing(formats: WeightFormats) -> None:
    if formats.quantizes:
        raise ModelLoadError(
            f"--quantization {formats.quantization} needs the native kernels for the CPU, and this forward is torch's: "
            "use auto or none, which expand what the checkpoint has quantized"
        )


def _on_cuda(
    checkpoint: Checkpoint, place: Place, num_threads: int | None, cpu_cores: Sequence[int], max_num_seqs: int
) -> RunnableModel:
    from engine.run.cuda_support import obstacle

    if reason := obstacle(checkpoint.config, place.dtype):
        log.warning("the forward on %s is plain torch's, far slower: %s", place.device, reason)
        return _on_torch(checkpoint, place, num_threads, cpu_cores)
    from engine.run.cuda import CudaModel

    log.info("the forward on %s is FlashInfer's and Triton's", place.device)
    if cpu_cores:
        os.sched_setaffinity(0, cpu_cores)
    return CudaModel(checkpoint, place, max_num_seqs)


def _on_torch(checkpoint: Checkpoint, place: Place, num_threads: int | None, cpu_cores: Sequence[int]) -> RunnableModel:
    import torch

    from engine.run.torch_model import TorchModel

    if cpu_cores:
        os.sched_setaffinity(0, cpu_cores)
    if num_threads or cpu_cores:
        torch.set_num_threads(num_threads or len(cpu_cores))
    return TorchModel(checkpoint, place)
