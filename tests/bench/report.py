"""How figures are shown: a plain table, a chart, and the machine they come from."""

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


def plot_bars(path: Path, groups: Sequence[str], bars: dict[str, Sequence[float]]) -> None:
    """One panel a group, since their units differ; lower is better in all of them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(groups), figsize=(2.4 * len(groups), 3.4), layout="constrained")
    for index, (panel, group) in enumerate(zip(panels, groups, strict=True)):
        for position, (name, values) in enumerate(bars.items()):
            drawn = panel.bar(position, values[index], label=name, color=f"C{position}")
            panel.bar_label(drawn, fmt="%.3g", fontsize=7)
        panel.set_title(group, fontsize=8)
        panel.set_xticks([])
        panel.spines[["top", "right"]].set_visible(False)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(bars), fontsize=8)
    figure.savefig(path, dpi=130)
