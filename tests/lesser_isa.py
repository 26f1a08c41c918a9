"""The same tests once more, for an instruction set that this machine has and would not choose by itself."""

from __future__ import annotations

import os
import subprocess
import sys

from kernels import cpu

ALL = ("generic", "avx2", "avx512", "avx512_bf16", "amx")
LESSER = ALL[: ALL.index(cpu.isa())] if cpu.isa() in ALL else ()
DEADLINE_S = 300
CHOSEN = "TANDEM_ISA" not in os.environ


def examples(count: int) -> int:
    """Of a test with random inputs: a third as many for each lesser set, which share most of their code."""
    return count if CHOSEN else -(-count // 3)


def check(file: str, isa: str, expression: str) -> None:
    """Runs the tests of `file` that pytest's `-k expression` chooses, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", file, "-k", expression],
        env={**os.environ, "TANDEM_ISA": isa},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout
