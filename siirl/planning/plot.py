"""Curves as an SVG file, without a plotting library: both axes logarithmic, numbers of workers below."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import TypeAlias

WIDTH, HEIGHT = 860, 400
LEFT, RIGHT, TOP, BOTTOM, GAP = 64, 16, 56, 44, 84
At: TypeAlias = Callable[[float, float], tuple[float, float]]
COLOURS = ("#1f6feb", "#d1570c", "#2d8a4e", "#8250df")


@dataclass(frozen=True)
class Curve:
    """Named points; not positive ones are left out."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    dashed: bool = False


@dataclass(frozen=True)
class Panel:
    """One pair of axes."""

    title: str
    curves: Sequence[Curve]


def svg(title: str, panels: Sequence[Panel]) -> str:
    """The text of an SVG file with the panels side by side."""
    width = (WIDTH - LEFT - RIGHT - GAP * (len(panels) - 1)) / len(panels)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'font-family="sans-serif" font-size="11">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        f'<text x="{LEFT}" y="20" font-size="14" font-weight="bold">{escape(title)}</text>',
    ]
    for number, panel in enumerate(panels):
        parts += _panel(panel, LEFT + number * (width + GAP), width)
    return "\n".join([*parts, "</svg>", ""])


def _panel(panel: Panel, left: float, width: float) -> list[str]:
    xs = [x for curve in panel.curves for x in curve.x]
    ys = [y for curve in panel.curves for y in curve.y if y > 0]
    low_x, high_x = math.log2(min(xs)), math.log2(max(xs))
    low_y, high_y = math.floor(math.log10(min(ys))), math.ceil(math.log10(max(ys)))
    high_y = max(high_y, low_y + 1)
    bottom = HEIGHT - BOTTOM

    def at(x: float, y: float) -> tuple[float, float]:
        across = (math.log2(x) - low_x) / max(high_x - low_x, 1e-9)
        up = (math.log10(y) - low_y) / (high_y - low_y)
        return left + across * width, bottom - up * (bottom - TOP)

    parts = [f'<text x="{left:.1f}" y="{TOP - 12}" font-weight="bold">{escape(panel.title)}</text>']
    for power in range(low_y, high_y + 1):
        _, y = at(min(xs), 10.0**power)
        parts.append(f'<path d="M{left:.1f} {y:.1f}h{width:.1f}" stroke="#dddddd"/>')
        parts.append(f'<text x="{left - 6:.1f}" y="{y + 4:.1f}" text-anchor="end">{_short(10.0**power)}</text>')
    for x_value in sorted(set(xs)):
        x, _ = at(x_value, min(ys))
        parts.append(f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{x_value:g}</text>')
    parts.append(f'<text x="{left + width / 2:.1f}" y="{bottom + 34}" text-anchor="middle">workers</text>')
    for number, curve in enumerate(panel.curves):
        parts += _curve(curve, COLOURS[number % len(COLOURS)], at, (left + 10, TOP + 14 + 16 * number))
    return parts


def _curve(curve: Curve, colour: str, at: At, legend: tuple[float, float]) -> list[str]:
    points = [at(x, y) for x, y in zip(curve.x, curve.y, strict=True) if y > 0]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dash = ' stroke-dasharray="5 4"' if curve.dashed else ""
    x, y = legend
    return [
        f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>',
        *(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3" fill="{colour}"/>' for px, py in points),
        f'<path d="M{x:.1f} {y - 4:.1f}h18" stroke="{colour}" stroke-width="2"{dash}/>',
        f'<text x="{x + 24:.1f}" y="{y:.1f}">{escape(curve.name)}</text>',
    ]


def _short(value: float) -> str:
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:g}{unit}"
    return f"{value:g}"
