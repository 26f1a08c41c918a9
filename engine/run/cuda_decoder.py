"""The decoder's forward in fused kernels, for CUDA: weights and arithmetic are those of engine.models.decoder."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.attention.flashinfer import FlashInferStep
from engine.layers.attention import Attention
from engine.models.decoder import Decoder, DecoderLayer
from kernels.triton.gate import silu_mul
from kernels.triton.norm import add_rms_norm, rms_norm
from kernels.triton.rotary import HeadNorms, rotate_and_store


@dataclass(frozen=True, slots=True)
class Inputs:
    """One forward's tokens, on the device; all [tokens] int64. Where their KV goes, the attention step knows."""

    tokens: Tensor
    positions: Tensor


class CudaDecoder:
    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.epsilon = decoder.config.rms_eps
        self.turns = turns_of(decoder)
        self.norms = [_head_norms(layer.attention) for layer in decoder.layers]
        # What follows each layer's MLP: the next layer's first norm, in the end the last norm.
        self.next_norms = [*(layer.attention_norm for layer in decoder.layers[1:]), decoder.norm]

    @torch.inference_mode()
    def __call__(self, inputs: Inputs, step: FlashInferStep, sampled: Tensor | None = None) -> Tensor:
        """Stores the batch's KV; returns the logits of the tokens `sampled` [sampled] int64, None being all: [sampled,
        vocab], in the model's dtype."""
        decoder = self.decoder
        stream = decoder.embedding(inputs.tokens)  # [tokens, hidden]
        normed = rms_norm(stream, decoder.layers[0].attention_norm.weight, self.epsilon)
        for number, layer in enumerate(decoder.layers):
            addend = self._attend(number, normed, inputs.positions, step)
            if sampled is not None and layer is decoder.layers[-1]:  # the others' KV is stored, and no more is asked
                stream, addend = stream.index_select(0, sampled), addend.index_select(0, sampled)
            addend = self._feed_forward(layer, stream, addend)
            normed = add_rms_norm(stream, addend, self.next_norms[number].weight, self.epsilon)
        return decoder.head(normed) if decoder.head else decoder.embedding.project(normed)

    def _attend(self, number: int, normed: Tensor, positions: Tensor, step: FlashInferStep) -> Tensor:
        """What a layer's attention adds to the stream: [tokens, hidden] to the same."""
        attention = self.decoder.layers[number].attention
        queries = rotate_and_store(
            attention.qkv(normed), self.turns, positions, step.slots, *step.layers[number], self.norms[number]
        )
        return attention.output(step.read(number, queries))

    def _feed_forward(self, layer: DecoderLayer, stream: Tensor, addend: Tensor) -> Tensor:
        """Adds to the stream in place; returns what the layer's MLP adds to it next."""
        normed = add_rms_norm(stream, addend, layer.mlp_norm.weight, self.epsilon)
        return layer.mlp.down(silu_mul(layer.mlp.gate_up(normed)))


def turns_of(decoder: Decoder) -> Tensor:
    """Of every position that the model knows: [positions, head_dim] float32, cosines, then sines."""
    rotary = decoder.rotary
    positions = torch.arange(decoder.config.max_positions, dtype=torch.float32, device=decoder.place.device)
    angles = torch.outer(positions, rotary.inverse_frequencies)
    return torch.cat((angles.cos(), angles.sin()), dim=-1) * rotary.attention_factor


def _head_norms(attention: Attention) -> HeadNorms | None:
    if attention.norms is None:
        return None
    query, key = attention.norms
    return HeadNorms(query.weight, key.weight, query.eps)
