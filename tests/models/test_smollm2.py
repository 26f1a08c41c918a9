"""The bundled model: loaded right, loaded fast, and answering as transformers does on the same weights."""

from __future__ import annotations

import time

import pytest
import torch
from forward import Forward
from gguf.quants import dequantize
from torch.testing import assert_close
from transformers import LlamaForCausalLM
from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor
from transformers.utils import is_kernels_available

from engine.models.decoder import Decoder
from engine.models.gguf_file import read_gguf
from engine.models.load import load_model
from engine.models.resolve import resolve
from tests.llama import llama_of

# <|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n
CAPITAL_TOKENS = [1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1, 520, 9531, 198]
LONG_TOKENS = [token * 7919 % 49152 for token in range(600)]
LOAD_CPU_S = 10.0  # of both cores together; a quiet machine needs 2


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return load_model(resolve("smollm2"), "float32", "cpu")


@pytest.fixture(scope="module")
def reference(decoder: Decoder) -> LlamaForCausalLM:
    return llama_of(decoder)


def test_logits_are_those_of_transformers(decoder: Decoder, reference: LlamaForCausalLM) -> None:
    for tokens in (CAPITAL_TOKENS, LONG_TOKENS):
        with torch.inference_mode():
            expected = reference(torch.tensor([tokens])).logits[0]
        found = Forward(decoder, block_size=16).in_chunks(tokens, [10, len(tokens) - 11, 1])
        assert_close(found, expected, rtol=1e-4, atol=2e-3)  # logits reach 30, in float32


def test_queries_and_keys_are_put_in_order_as_transformers_does_it(decoder: Decoder) -> None:
    tensors, config = read_gguf(resolve("smollm2")).tensors, decoder.config
    heads = {"num_attention_heads": config.num_heads, "num_key_value_heads": config.num_kv_heads}
    for layer in (0, config.num_layers - 1):
        for short in ("attn_q", "attn_k", "attn_v"):
            tensor = tensors[f"blk.{layer}.{short}.weight"]
            expected = LlamaTensorProcessor(heads).process(dequantize(tensor.rows, tensor.kind), tensor.name).weights
            found = decoder.targets()[f"model.layers.{layer}.self_attn.{short[-1]}_proj.weight"]
            assert torch.equal(found, torch.from_numpy(expected))


def test_bfloat16_answers_a_question() -> None:
    forward = Forward(load_model(resolve("smollm2"), "bfloat16", "cpu"), block_size=16)
    sequence = forward.sequence([*CAPITAL_TOKENS, *[0] * 10])
    del sequence.tokens[len(CAPITAL_TOKENS) :]
    for _ in range(8):
        logits = forward.step([sequence], [sequence.num_missing])[0]
        sequence.tokens.append(int(logits[-1].argmax()))
    vocabulary = read_gguf(resolve("smollm2")).metadata["tokenizer.ggml.tokens"]
    answer = "".join(vocabulary[token] for token in sequence.tokens[len(CAPITAL_TOKENS) :]).replace("Ġ", " ")
    assert answer == "The capital of France is Paris.<|im_end|>"


def test_loading_takes_little_work() -> None:
    started = time.process_time()
    load_model(resolve("smollm2"), "bfloat16", "cpu")
    assert time.process_time() - started < LOAD_CPU_S


def test_transformers_does_not_take_our_kernels_for_its_own() -> None:
    """Both packages are imported as `kernels`; transformers tells them apart by version."""
    assert not is_kernels_available()
