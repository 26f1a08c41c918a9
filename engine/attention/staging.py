"""Pinned host memory, used again each step: a step's index arrays go to the device from it while the host goes on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

DTYPES = {np.dtype(np.int32): torch.int32, np.dtype(np.int64): torch.int64}
ALIGNMENT = 16  # bytes; copies between aligned addresses are the fast ones


class Staging:
    def __init__(self, device: torch.device, capacity_bytes: int) -> None:
        """Grows when a step needs more."""
        self.device = device
        self._memory = self._allocated(capacity_bytes)
        self._used = 0
        self._sent = torch.cuda.Event()  # type: ignore[no-untyped-call]

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around everything that puts. Waits for the last step's copies, not for its forward: FlashInfer plans through
        pinned memory of its own, one for all steps, so plans belong inside as well."""
        self._sent.synchronize()
        self._used = 0
        yield
        self._sent.record()

    def put(self, array: NDArray[Any]) -> Tensor:
        """The array, of one dimension, in pinned memory until the next step."""
        size, start = array.nbytes, -(-self._used // ALIGNMENT) * ALIGNMENT
        if start + size > len(self._memory):
            # Views that were given out keep the old memory alive.
            self._memory, start = self._allocated(2 * (len(self._memory) + size)), 0
        self._used = start + size
        view = self._memory[start : start + size].view(DTYPES[array.dtype])
        view.numpy()[:] = array
        return view

    def send(self, array: NDArray[Any], target: Tensor | None = None) -> Tensor:
        """A copy on the device, in the first items of `target` where one is given. Does not wait."""
        pinned = self.put(array)
        if target is None:
            return pinned.to(self.device, non_blocking=True)
        place = target[: len(array)]
        place.copy_(pinned, non_blocking=True)
        return place

    @staticmethod
    def _allocated(size_bytes: int) -> Tensor:
        return torch.empty(size_bytes, dtype=torch.uint8, pin_memory=True)
