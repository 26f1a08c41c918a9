"""Runs a decoder on token lists, the way the engine does, and shows the logits."""

from __future__ import annotations

from collections.abc import Sequence as Several
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from engine.attention.metadata import Batch, batch_of
from engine.attention.pool import PagedPool
from engine.attention.reference import ReferenceAttention
from engine.attention.tensors import BatchTensors
from engine.core import Request, SamplingParams, Sequence, Step
from engine.models.decoder import Decoder
from kvtransfer.layout import KVLayout


@dataclass
class Forward:
    """A decoder with a pool. Blocks are dealt out of order, so that none lies where a naive index would find it."""

    decoder: Decoder
    block_size: int = 4
    num_blocks: int = 256
    free: list[int] = field(init=False)

    def __post_init__(self) -> None:
        config = self.decoder.config
        layout = KVLayout(
            num_blocks=self.num_blocks,
            block_size=self.block_size,
            num_layers=config.num_layers,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            dtype=str(self.decoder.place.dtype).removeprefix("torch."),
        )
        pool = PagedPool.allocated(layout, self.decoder.place.device)
        pool.items.fill_(torch.nan)  # whoever reads what was never written poisons its answer
        self.attention = ReferenceAttention(pool, config.windows)
        self.free = [block * 7 % self.num_blocks for block in range(self.num_blocks)]

    def sequence(self, tokens: list[int]) -> Sequence:
        request = Request(id="test", prompt=tokens, sampling=SamplingParams(max_tokens=1, seed=0))
        sequence = Sequence.of(request, arrival=0.0)
        sequence.block_table = [self.free.pop() for _ in range(-(-len(tokens) // self.block_size))]
        return sequence

    def step(self, sequences: list[Sequence], num_new: list[int]) -> list[Tensor]:
        """Logits [new tokens, vocab] of every new token, a tensor for each row."""
        batch = batch_of(Step(sequences, num_new), self.block_size)
        every = replace(batch, sampled=np.arange(len(batch.tokens)))
        logits = self.logits(every)
        for sequence, count in zip(sequences, num_new, strict=True):
            sequence.num_computed += count
        return list(torch.split(logits, num_new))

    def logits(self, batch: Batch) -> Tensor:
        return self.decoder(BatchTensors.of(batch, self.decoder.place.device), self.attention.plan(batch))

    def whole(self, tokens: list[int]) -> Tensor:
        """Logits [tokens, vocab], all in one step."""
        return self.step([self.sequence(tokens)], [len(tokens)])[0]

    def in_chunks(self, tokens: list[int], chunks: Several[int]) -> Tensor:
        """The same in several steps."""
        sequence = self.sequence(tokens)
        return torch.cat([self.step([sequence], [count])[0] for count in chunks])
