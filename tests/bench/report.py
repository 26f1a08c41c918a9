"""How figures are shown: a plain table, and the machine they come from."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from pathlib import Path


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown, aligned so that it reads well in a terminal too."""
    widths = [max(len(line[column]) for line in [header, *rows]) for column in range(len(header))]
    lines = [_line(header, widths), "|" + "|".join("-" * (width + 2) for width in widths) + "|"]
    return "\n".join(lines + [_line(row, widths) for row in rows])


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "| " + " | ".join(f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True)) + " |"


def machine() -> str:
    """One line: the processor, how many cores this process may use, its matrix instructions, the system."""
    facts = dict(
        (part.strip() for part in line.split(":", 1))
        for line in Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0].splitlines()
        if ":" in line
    )
    flags = facts.get("flags", "").split()
    known = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    cores = len(os.sched_getaffinity(0))
    return (
        f"{facts.get('model name', platform.machine())}, {cores} cores, {' '.join(known)}, Linux {platform.release()}"
    )
