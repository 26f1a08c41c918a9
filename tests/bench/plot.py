"""Charts as SVG, drawn here: bars in panels, and lines over a common axis. Nothing to install; light and dark alike."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

COLOURS = ("#2f6fb5", "#d9822b", "#3a9a5c", "#b8433f", "#8062ad", "#8a6d4f", "#4aa3a8", "#777777")
STYLE = (
    "<style>text{font:11px system-ui,sans-serif;fill:#222}.title{font-weight:600}.axis{stroke:#999;fill:none}"
    ".grid{stroke:#8884;fill:none}@media(prefers-color-scheme:dark){text{fill:#ddd}}</style>"
)
PANEL_HEIGHT, TOP, BOTTOM, LEGEND_ROW = 170, 44, 16, 18
BAR, GAP = 22, 8
WIDTH, HEIGHT, MARGIN = 640, 380, 56  # of a chart of lines


@dataclass(frozen=True, slots=True)
class Panel:
    """One group of bars, with a scale of its own: units differ from panel to panel. None: nothing was measured."""

    title: str
    unit: str
    values: Mapping[str, float | None]  # name → height


def bars(path: Path, panels: Sequence[Panel]) -> None:
    """One colour a name, the same in every panel; lower is better or not, the titles must say."""
    names = list(dict.fromkeys(name for panel in panels for name in panel.values))
    panel_width = max(130, len(names) * BAR + 2 * GAP)
    width = len(panels) * panel_width
    parts = [_panel(panel, names, index * panel_width) for index, panel in enumerate(panels)]
    legend, rows = _legend(names, width, TOP + PANEL_HEIGHT + BOTTOM + 6)
    _write(path, width, TOP + PANEL_HEIGHT + BOTTOM + rows * LEGEND_ROW + 10, [*parts, legend])


def _panel(panel: Panel, names: Sequence[str], left: float) -> str:
    highest = max((value for value in panel.values.values() if value), default=1.0)
    base = TOP + PANEL_HEIGHT
    parts = [_text(left + GAP, 16, panel.title, "title"), _text(left + GAP, 30, panel.unit)]
    parts.append(f'<path class="axis" d="M{left + GAP} {base}h{len(names) * BAR}"/>')
    for place, name in enumerate(names):
        value, x = panel.values.get(name), left + GAP + place * BAR
        if value is None:
            parts.append(_text(x + BAR / 2, base - 4, "–", anchor="middle"))
            continue
        height = (PANEL_HEIGHT - 16) * value / highest
        parts.append(
            f'<rect x="{x + 2:.1f}" y="{base - height:.1f}" width="{BAR - 4}" height="{height:.1f}" '
            f'fill="{_colour(place)}"><title>{escape(name)}: {value:.3g} {escape(panel.unit)}</title></rect>'
        )
        parts.append(
            f'<text x="{x + BAR / 2:.1f}" y="{base - height - 3:.1f}" text-anchor="middle" '
            f'style="font-size:8px">{value:.3g}</text>'
        )
    return "".join(parts)


def lines(
    path: Path, title: str, x_label: str, y_label: str, points: Mapping[str, Sequence[tuple[float, float]]]
) -> None:
    """`points`: name → (x, y) by rising x. Both axes begin at zero. The dashed diagonal is y = x."""
    right = max(x for line in points.values() for x, _ in line) * 1.05
    top = max(right, *(y for line in points.values() for _, y in line))
    across, down = (WIDTH - 2 * MARGIN) / right, (HEIGHT - 2 * MARGIN) / top

    def at(x: float, y: float) -> str:
        return f"{MARGIN + x * across:.1f},{HEIGHT - MARGIN - y * down:.1f}"

    parts = [_text(MARGIN, 20, title, "title"), _text(MARGIN, 36, y_label)]
    parts.append(_text(WIDTH - MARGIN, HEIGHT - 16, x_label, anchor="end"))
    for tick in _ticks(right):
        parts.append(_text(MARGIN + tick * across, HEIGHT - MARGIN + 16, f"{tick:g}", anchor="middle"))
    for tick in _ticks(top):
        parts.append(_text(MARGIN - 6, HEIGHT - MARGIN - tick * down + 4, f"{tick:g}", anchor="end"))
        parts.append(f'<polyline class="grid" points="{at(0, tick)} {at(right, tick)}"/>')
    parts.append(f'<polyline class="axis" stroke-dasharray="4 4" points="{at(0, 0)} {at(right, right)}"/>')
    for place, (name, line) in enumerate(points.items()):
        drawn = " ".join(at(x, y) for x, y in line)
        parts.append(f'<polyline fill="none" stroke-width="2" stroke="{_colour(place)}" points="{drawn}"/>')
        for x, y in line:
            cx, cy = at(x, y).split(",")
            told = f"{escape(name)}: {y:.2f} of {x:.2f}"
            parts.append(f'<circle cx="{cx}" cy="{cy}" r="3.5" fill="{_colour(place)}"><title>{told}</title></circle>')
    legend, rows = _legend(list(points), WIDTH, HEIGHT)
    _write(path, WIDTH, HEIGHT + rows * LEGEND_ROW + 6, [*parts, legend])


def _ticks(highest: float) -> list[float]:
    """Some five round numbers from zero."""
    step = 10 ** math.floor(math.log10(highest / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if highest / (step * factor) <= 6)
    return [step * number for number in range(int(highest / step) + 1)]


def _legend(names: Sequence[str], width: float, top: float) -> tuple[str, int]:
    """Its SVG, and how many rows it takes."""
    parts, x, row = [], float(GAP), 0
    for place, name in enumerate(names):
        needs = 24 + 6.6 * len(name)
        if x + needs > width and x > GAP:
            x, row = float(GAP), row + 1
        y = top + row * LEGEND_ROW
        parts.append(f'<rect x="{x:.1f}" y="{y:.1f}" width="11" height="11" fill="{_colour(place)}"/>')
        parts.append(_text(x + 15, y + 10, name))
        x += needs
    return "".join(parts), row + 1


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    marked = f' class="{kind}"' if kind else ""
    return f'<text{marked} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _colour(place: int) -> str:
    return COLOURS[place % len(COLOURS)]


def _write(path: Path, width: float, height: float, parts: Sequence[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}">'
    path.write_text(f"{head}{STYLE}{''.join(parts)}</svg>\n", encoding="utf-8")
