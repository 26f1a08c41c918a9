"""The executor in the engine core's own process: one decoder, one pool, one device."""

from __future__ import annotations

import time
from collections.abc import Collection
from math import prod

from engine.attention.metadata import batch_of
from engine.core import ModelInfo, Request, SamplingParams, Sequence, Step, StepOutput
from engine.models.errors import ModelLoadError
from engine.models.resolve import resolve
from engine.models.weights import weight_shapes
from engine.run.executor import Memory
from engine.run.model import load_runnable
from engine.run.weight_formats import AUTO
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
        cpu_cores: Collection[int] = (),
        max_num_seqs: int = 64,
        quantization: str = AUTO,
    ) -> None:
        """Loads the model. `served_name` None is `model` itself; `num_threads` None is one for each of `cpu_cores`,
        or for each core that this process may use. A step has at most `max_num_seqs` rows. `quantization`: see
        `WeightFormats`. Raises ModelLoadError."""
        started = time.monotonic()
        self.name = served_name or model
        self.block_size = block_size
        cores = tuple(cpu_cores)
        self.model = load_runnable(resolve(model), dtype, device, num_threads, cores, max_num_seqs, quantization)
        self.max_model_len = self._checked_length(max_model_len)
        self.load_seconds = time.monotonic() - started

    def _checked_length(self, wanted: int | None) -> int:
        longest = self.model.config.max_positions
        if wanted is not None and not 0 < wanted <= longest:
            raise ModelLoadError(f"max_model_len {wanted} is outside what the model can do: 1 to {longest} tokens")
        return wanted or longest

    @property
    def draft_rows(self) -> int:
        return self.model.draft_rows

    def layout(self, num_blocks: int) -> KVLayout:
        config = self.model.config
        return KVLayout(
            num_blocks=num_blocks,
            block_size=self.block_size,
            num_layers=config.num_layers,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            dtype=self.model.place.dtype,
        )

    def model_info(self, num_blocks: int) -> ModelInfo:
        config = self.model.config
        return ModelInfo(
            name=self.name,
            max_model_len=self.max_model_len,
            vocab_size=config.vocab_size,
            eos_token_ids=config.eos_token_ids,
            num_blocks=num_blocks,
            block_size=self.block_size,
            dtype=self.model.place.dtype,
            quantization=self.model.quantization,
            device=self.model.place.device_type,
            num_parameters=sum(map(prod, weight_shapes(config).values())),
            load_seconds=self.load_seconds,
        )

    def attach(self, pool: Memory) -> None:
        view = memoryview(pool)
        num_blocks, rest = divmod(view.nbytes, self.layout(1).block_bytes)
        if view.readonly or rest or not num_blocks:
            raise ValueError(f"a pool must be writable and whole blocks of {self.layout(1).block_bytes} bytes")
        self.model.attach(self.layout(num_blocks), view)

    def detach(self) -> None:
        self.model.detach()

    def warm_up(self) -> None:
        # Several tokens in one step, then one: the two shapes that attention knows have both run.
        request = Request(id="warm-up", prompt=[0] * WARM_UP_TOKENS, sampling=SamplingParams(max_tokens=1, seed=0))
        sequence = Sequence.of(request, arrival=time.monotonic())
        sequence.block_table = list(range(-(-WARM_UP_TOKENS // self.block_size)))
        for count in (WARM_UP_TOKENS - 1, 1):
            self.execute(Step([sequence], [count]))
            sequence.num_computed += count

    def execute(self, step: Step) -> StepOutput:
        batch = batch_of(step, self.block_size)
        logits = self.model(batch)  # [sampled rows, vocab]
        rows = step.sampled()
        return self.model.sample(logits, rows) if rows else StepOutput([], [])
