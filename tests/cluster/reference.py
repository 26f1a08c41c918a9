"""What transformers itself answers, greedily, with our weights."""

from __future__ import annotations

import torch

from engine.models.load import load_model
from engine.models.resolve import resolve
from tests.cluster.local_cluster import MODEL
from tests.llama import llama_of


class Reference:
    """float32 on the CPU. It is given our dequantised weights; all arithmetic is transformers' own."""

    def __init__(self) -> None:
        self._model = llama_of(load_model(resolve(MODEL), "float32", "cpu"))

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
