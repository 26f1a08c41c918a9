"""The executor in the engine core's own process: one decoder, one pool, one device."""

from __future__ import annotations

import time

import torch

from engine.attention.metadata import batch_of
from engine.attention.pool import PagedPool
from engine.attention.reference import ReferenceAttention
from engine.core import ModelInfo, Request, SamplingParams, Sequence, Step, StepOutput
from engine.models.errors import ModelLoadError
from engine.models.load import load_model
from engine.models.resolve import resolve
from engine.run.executor import Memory
from engine.sampling.sampler import sample
from kvtransfer.layout import KVLayout

WARM_UP_TOKENS = 4


class LocalExecutor:
    def __init__(
        self,
        model: str,
        served_name: str | None = None,
        dtype: str = "auto",
        device: str = "auto",
        block_size: int = 16,
        num_threads: int | None = None,
        max_model_len: int | None = None,
    ) -> None:
        """Loads the model. `served_name` None is `model` itself; `num_threads` None leaves torch's choice. Raises
        ModelLoadError."""
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        started = time.monotonic()
        self.name = served_name or model
        self.block_size = block_size
        self.decoder = load_model(resolve(model), dtype, device)
        self.max_model_len = self._checked_length(max_model_len)
        self.load_seconds = time.monotonic() - started
        self._attention: ReferenceAttention | None = None

    def _checked_length(self, wanted: int | None) -> int:
        longest = self.decoder.config.max_positions
        if wanted is not None and not 0 < wanted <= longest:
            raise ModelLoadError(f"max_model_len {wanted} is outside what the model can do: 1 to {longest} tokens")
        return wanted or longest

    def layout(self, num_blocks: int) -> KVLayout:
        config = self.decoder.config
        return KVLayout(
            num_blocks=num_blocks,
            block_size=self.block_size,
            num_layers=config.num_layers,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            dtype=self._dtype_name,
        )

    @property
    def _dtype_name(self) -> str:
        return str(self.decoder.place.dtype).removeprefix("torch.")

    def model_info(self, num_blocks: int) -> ModelInfo:
        config = self.decoder.config
        return ModelInfo(
            name=self.name,
            max_model_len=self.max_model_len,
            vocab_size=config.vocab_size,
            eos_token_ids=config.eos_token_ids,
            num_blocks=num_blocks,
            block_size=self.block_size,
            dtype=self._dtype_name,
            device=self.decoder.place.device.type,
            num_parameters=self.decoder.num_parameters,
            load_seconds=self.load_seconds,
        )

    def attach(self, pool: Memory) -> None:
        view = memoryview(pool)
        num_blocks, rest = divmod(view.nbytes, self.layout(1).block_bytes)
        if view.readonly or rest or not num_blocks:
            raise ValueError(f"a pool must be writable and whole blocks of {self.layout(1).block_bytes} bytes")
        layout, device = self.layout(num_blocks), self.decoder.place.device
        # Where the device cannot reach the given memory, the pool is the device's own.
        paged = PagedPool.over(layout, view) if device.type == "cpu" else PagedPool.allocated(layout, device)
        self._attention = ReferenceAttention(paged, self.decoder.config.windows)

    def detach(self) -> None:
        self._attention = None

    def warm_up(self) -> None:
        # Several tokens in one step, then one: the two shapes that attention knows have both run.
        request = Request(id="warm-up", prompt=[0] * WARM_UP_TOKENS, sampling=SamplingParams(max_tokens=1, seed=0))
        sequence = Sequence.of(request, arrival=time.monotonic())
        sequence.block_table = list(range(-(-WARM_UP_TOKENS // self.block_size)))
        for count in (WARM_UP_TOKENS - 1, 1):
            self.execute(Step([sequence], [count]))
            sequence.num_computed += count

    def execute(self, step: Step) -> StepOutput:
        assert self._attention is not None, "attach a pool before executing"
        batch = batch_of(step, self.block_size, self.decoder.place.device)
        logits = self.decoder(batch, self._attention.plan(batch))  # [sampled rows, vocab]
        rows = [sequence for i, sequence in enumerate(step.sequences) if step.samples(i)]
        return sample(logits, rows) if rows else StepOutput([], [])
