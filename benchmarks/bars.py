"""Grouped bars on a logarithmic axis, as SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

COLOURS = ("#1b6ca8", "#6fb1e0", "#c8553d", "#e0a458", "#8a8d91")
WIDTH, PANEL, LEFT, TOP = 760, 250, 70, 70


@dataclass(frozen=True)
class Panel:
    """One chart: for every group (on the horizontal axis) and series, a positive number."""

    title: str
    unit: str
    groups: Sequence[str]
    series: Mapping[str, Sequence[float]]


def draw(title: str, panels: Sequence[Panel]) -> str:
    """Return the picture, one panel below the other, with one legend."""
    names = list(panels[0].series)
    height = TOP + len(panels) * (PANEL + 60)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"',
        ' font-family="sans-serif" font-size="12" fill="#222">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        _text(LEFT, 24, title, "font-size='16' font-weight='bold'"),
    ]
    for index, name in enumerate(names):
        x = LEFT + index * (WIDTH - LEFT - 10) / len(names)
        parts.append(f'<rect x="{x:.0f}" y="38" width="11" height="11" fill="{COLOURS[index]}"/>')
        parts.append(_text(x + 16, 48, name))
    for index, panel in enumerate(panels):
        parts += _panel(panel, TOP + 30 + index * (PANEL + 60))
    return "\n".join([*parts, "</svg>\n"])


def _panel(panel: Panel, top: float) -> list[str]:
    numbers = [number for values in panel.series.values() for number in values]
    low, high = math.floor(math.log10(min(numbers))), math.ceil(math.log10(max(numbers)))
    bottom, right = top + PANEL - 30, WIDTH - 10

    def level(number: float) -> float:
        return bottom - (math.log10(number) - low) / (high - low) * (bottom - top - 15)

    parts = [_text(LEFT, top - 6, f"{panel.title} ({panel.unit})", "font-weight='bold'")]
    for power in range(low, high + 1):
        y = level(10.0**power)
        parts.append(f'<line x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(_text(LEFT - 8, y + 4, f"{10.0**power:,g}", "text-anchor='end'"))
    step = (right - LEFT) / len(panel.groups)
    width = step * 0.8 / len(panel.series)
    for group, name in enumerate(panel.groups):
        start = LEFT + group * step + step * 0.1
        parts.append(_text(start + step * 0.4, bottom + 18, name, "text-anchor='middle'"))
        for index, values in enumerate(panel.series.values()):
            x, y = start + index * width, level(values[group])
            parts.append(
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{width - 3:.1f}" height="{bottom - y:.1f}"'
                f' fill="{COLOURS[index]}"/>'
            )
            label = f"{values[group]:,.0f}" if values[group] >= 100 else f"{values[group]:.3g}"
            parts.append(_text(x + width / 2 - 1.5, y - 4, label, "text-anchor='middle' font-size='11'"))
    return parts


def _text(x: float, y: float, text: str, style: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(text)}</text>'
