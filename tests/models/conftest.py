"""One thread for torch: on a busy machine its threads wait for each other at every small product, and wait long."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
