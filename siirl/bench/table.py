"""Results for a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NAME = 39
HEADER = f"  {'':<{NAME}} {'time':>8} {'rate':>14} {'ratio':>6} {'ops':>6}"


def line_of(benchmark: Mapping[str, Any]) -> str:
    """A benchmark's line: its fastest time and rate, that time as a share of the reference's, its operators' calls.

    A name that is too long has a line of its own.
    """
    info, name = benchmark["extra_info"], benchmark["name"]
    seconds = per_call(benchmark)
    if len(name) > NAME:
        name = f"{name}\n  {'':<{NAME}}"
    rate = _rate(info["amount"] / seconds, info["unit"])
    calls = info["counters"]["op_calls"]
    return f"  {name:<{NAME}} {time_text(seconds):>8} {rate:>14} {info['ratio']:>5.2f}x {calls:>6}"


def per_call(benchmark: Mapping[str, Any], statistic: str = "min") -> float:
    """Seconds of one call of the work: the fastest, or another statistic."""
    return benchmark["stats"][statistic] / benchmark["extra_info"]["calls_per_round"]


def time_text(seconds: float) -> str:
    """``1.32 ms``."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def _rate(per_second: float, unit: str) -> str:
    """``12.7 GB/s``; ``11.3k tokens/s``."""
    for prefix, size in (("G", 1e9), ("M", 1e6), ("k", 1e3), ("", 1.0)):
        if per_second >= size or not prefix:
            break
    number = f"{per_second / size:.3g}"
    return f"{number} {prefix}B/s" if unit == "bytes" else f"{number}{prefix} {unit}/s"
