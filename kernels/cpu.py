"""The kernels for the CPU: native where the package was built with a compiler, else the plain reference.

Import functions from here, never from `kernels._native`. An engine says which of the two it runs by `REASON`.
"""

from __future__ import annotations

from importlib import metadata
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kernels import reference

STRANGER = "kernels"  # the distribution of Hugging Face's package, which has the same import name


def _refuse_stranger() -> None:
    """Raises ImportError when both packages are installed: their files lie over each other in one folder."""
    try:
        metadata.version(STRANGER)
    except metadata.PackageNotFoundError:
        return
    raise ImportError(
        "the Hugging Face package 'kernels' is installed beside Tandem, whose own package has the same name. "
        "Uninstall it (pip uninstall kernels) and install Tandem again, or give Tandem its own virtual environment."
    )


class _Kernels(Protocol):
    """What the native module and the reference both are."""

    def copy_ranges(self, source: memoryview, destination: memoryview, copies: NDArray[np.int64]) -> None: ...

    def isa(self) -> str: ...


def _load() -> tuple[_Kernels, str]:
    try:
        from kernels import _native
    except ImportError as error:
        return reference, f"plain reference kernels, slower: the native ones are not built here ({error})"
    return _native, f"native kernels for {_native.isa()}"


_refuse_stranger()
_kernels, REASON = _load()
NATIVE = _kernels is not reference


def copy_ranges(source: memoryview, destination: memoryview, copies: NDArray[np.int64]) -> None:
    """Copies byte ranges from one buffer to another, in order; other threads run meanwhile.

    `source` and `destination` are one-dimensional buffers of uint8, `copies` is [n, 3]: source offset, destination
    offset and length in bytes. The ranges read must not overlap those written. Large batches go past the caches with
    streaming stores; what the caller reads of `source` afterwards, it reads later than all that was copied. Raises
    ValueError, having copied nothing, when a range does not lie inside both buffers.
    """
    _kernels.copy_ranges(source, destination, copies)


def isa() -> str:
    """The instruction set in use: "amx", "avx512_bf16", "avx512", "avx2", "sse2", "generic", or "reference" without
    native kernels. The environment variable TANDEM_ISA asks for a lesser one."""
    return _kernels.isa()
