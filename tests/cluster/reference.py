"""What transformers itself answers, greedily, with our weights."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from engine.models.load import load_model
from engine.models.resolve import resolve
from tests.cluster.local_cluster import MODEL


class Reference:
    """float32 on the CPU. It is given our dequantised weights; all arithmetic is transformers' own."""

    def __init__(self) -> None:
        decoder = load_model(resolve(MODEL), "float32", "cpu")
        config = decoder.config
        shape = LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            max_position_embeddings=config.max_positions,
            rms_norm_eps=config.rms_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope.theta},
            tie_word_embeddings=True,
        )
        with torch.device("meta"):
            self._model = LlamaForCausalLM(shape)
        weights = dict(decoder.targets())
        head = {"lm_head.weight": weights["model.embed_tokens.weight"]}
        self._model.load_state_dict(weights | head, assign=True)
        self._model.model.rotary_emb = type(self._model.model.rotary_emb)(shape)  # no weights, so still on meta
        self._model.eval()

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        """The next `count` tokens, whatever they are. With one thread: more would fight the engines for the cores."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return self._greedy(prompt, count)
        finally:
            torch.set_num_threads(threads)

    @torch.inference_mode()
    def _greedy(self, prompt: list[int], count: int) -> list[int]:
        found: list[int] = []
        known, cache = torch.tensor([prompt]), None
        while len(found) < count:
            output = self._model(known, past_key_values=cache, use_cache=True, logits_to_keep=1)
            found.append(int(output.logits[0, -1].argmax()))
            known, cache = torch.tensor([found[-1:]]), output.past_key_values
        return found
