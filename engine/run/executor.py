"""What the engine core asks of whatever runs the model, in this process or on several GPUs. Imports no torch."""

from __future__ import annotations

from mmap import mmap
from typing import Protocol

from engine.core import ModelInfo, Step, StepOutput
from kvtransfer.layout import KVLayout

Memory = memoryview | bytearray | mmap  # writable, contiguous bytes


class Executor(Protocol):
    """In order: choose `num_blocks`, make memory of `layout(num_blocks).pool_bytes`, attach it, warm up, execute."""

    @property
    def draft_rows(self) -> int:
        """Rows of a step up to which one more costs little; 0 where it would change the other rows' numbers."""

    def layout(self, num_blocks: int) -> KVLayout:
        """How a pool of so many blocks is laid out for this model."""

    def model_info(self, num_blocks: int) -> ModelInfo: ...

    def attach(self, pool: Memory) -> None:
        """Uses this memory, a whole number of blocks, as the KV pool. On CUDA the pool is the device's own, of the same
        size. Raises ValueError when the memory is read-only or holds no block."""

    def detach(self) -> None:
        """Lets go of the memory, so that its owner can unmap it. Idempotent."""

    def warm_up(self) -> None:
        """Runs one tiny forward in block 0, so that the first request is not slow. Call it before any block is used."""

    def execute(self, step: Step) -> StepOutput:
        """Computes each row's new tokens and its draft, and samples for the rows that catch up. Changes no sequence."""


def blocks_within(executor: Executor, kv_cache_memory_bytes: int) -> int:
    """How many blocks fit. Raises ValueError when not even one does."""
    block_bytes = executor.layout(1).block_bytes
    num_blocks = kv_cache_memory_bytes // block_bytes
    if num_blocks < 1:
        raise ValueError(f"a KV cache of {kv_cache_memory_bytes} bytes holds no block: one takes {block_bytes} bytes")
    return num_blocks
