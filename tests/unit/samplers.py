"""The samplers that there are on this machine, called alike."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from engine.core import Sequence, StepOutput
from engine.sampling import sampler
from kernels import cpu

Sampler = Callable[[Tensor, list[Sequence]], StepOutput]

SAMPLERS: dict[str, Sampler] = {"torch": sampler.sample}

if cpu.NATIVE:
    from engine.sampling import native

    SAMPLERS["native"] = lambda logits, rows: native.sample(logits.float().numpy(), rows)
