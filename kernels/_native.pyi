"""What csrc/module.cpp defines; see kernels/cpu.py for the meaning."""

import numpy as np
from numpy.typing import NDArray

def copy_ranges(source: memoryview, destination: memoryview, copies: NDArray[np.int64]) -> None: ...
def isa() -> str: ...
