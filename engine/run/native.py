"""The native decoder: a checkpoint's packed weights, and its forward in one call. Imports no torch."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from engine.attention.metadata import Batch
from engine.core import Row, StepOutput
from engine.models.checkpoint import Checkpoint
from engine.models.config import ModelConfig
from engine.models.place import Place
from engine.models.rotary import inverse_frequencies
from engine.run.native_weights import NativeWeights
from engine.run.weight_formats import AUTO, WeightFormats
from engine.sampling.native import sample
from kernels import cpu
from kernels.decoder import BatchIndices, Decoder, DecoderShape, KVPool
from kernels.kinds import Floats
from kernels.threads import set_threads
from kvtransfer.layout import KVLayout

DRAFT_ROWS = 8  # a row more costs a third of one, of packed weights
DRAFT_ROWS_OF_TILES = 16  # as many as a tile takes, each for a twentieth of one

log = logging.getLogger(__name__)


class NativeModel:
    """What a decoder computes: products of its dtype, float32 between them."""

    def __init__(self, config: ModelConfig, place: Place, quantization: str, kernel: Decoder) -> None:
        self.config = config
        self.place = place
        self.quantization = quantization
        tiles = cpu.isa() == "amx" and place.dtype == "bfloat16"
        self.draft_rows = DRAFT_ROWS_OF_TILES if tiles else DRAFT_ROWS
        self.kernel = kernel
        self._pool: KVPool | None = None

    def attach(self, layout: KVLayout, memory: memoryview) -> None:
        self._pool = KVPool(np.frombuffer(memory, np.uint8), self.place.dtype, layout.block_size)

    def detach(self) -> None:
        self._pool = None

    def __call__(self, batch: Batch) -> Floats:
        """float32 whatever the dtype."""
        assert self._pool is not None, "attach a pool before executing"
        indices = BatchIndices(batch.tokens, batch.starts, batch.context_lengths, batch.block_tables, batch.sampled)
        return self.kernel.forward(indices, self._pool)

    def sample(self, logits: Floats, rows: Sequence[Row]) -> StepOutput:
        return sample(logits, rows)


def load_native(
    checkpoint: Checkpoint, place: Place, num_threads: int, cores: Sequence[int] = (), quantization: str = AUTO
) -> NativeModel:
    """With `cores`, one for each thread, every thread is bound to its own. `quantization`: see `WeightFormats`. Raises
    ModelLoadError when the weights cannot be kept so."""
    config, formats = checkpoint.config, WeightFormats(quantization, place.dtype)
    set_threads(num_threads, cores)
    weights = NativeWeights(checkpoint.weights, config, formats, cores)
    embedding = weights.embedding()
    head = embedding if config.tied_embeddings else weights.head()
    layers = [weights.layer(number) for number in range(config.num_layers)]
    weights.check_quantized()
    log.info("weights of %s", weights.summary())
    kernel = Decoder(shape_of(config), embedding, layers, weights.last_norm(), head)
    return NativeModel(config, place, weights.quantization(), kernel)


def shape_of(config: ModelConfig) -> DecoderShape:
    return DecoderShape(
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        vocab_size=config.vocab_size,
        epsilon=config.rms_eps,
        frequencies=inverse_frequencies(config.rope, config.head_dim).tolist(),
        windows=[window or 0 for window in config.windows],
        rotary_scale=config.rope.attention_factor,
    )
