"""`report.html`: a run on one self-contained page, without a script; every text is escaped."""

from __future__ import annotations

import base64
import hashlib
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2

from siirl.validation.checks import TITLES
from siirl.validation.report import Report, Result

_TILES = (
    ("passed", "promises kept"),
    ("failed", "promises broken"),
    ("expected", "known differences"),
    ("skipped", "not applicable"),
)


def write_page(report: Report, path: Path) -> None:
    """Write the page of a run."""
    path.write_text(render(report), encoding="utf-8", errors="replace")


def render(report: Report) -> str:
    """The page. Its content security policy admits its own style, by its hash, and nothing else."""
    style = _asset("siirl.telemetry", "report.css") + _asset("siirl.validation", "validation.css")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.globals.update(share=_share, number=_number)
    template = environment.from_string(_asset("siirl.validation", "validation.html"))
    counts = report.counts()
    return template.render(
        policy=f"default-src 'none'; base-uri 'none'; form-action 'none'; style-src 'sha256-{digest}'",
        style=jinja2.filters.Markup(style),
        report=report,
        tiles=[(counts[status], title, status) for status, title in _TILES],
        levels=[(level, TITLES[level], report.counts(level), _of(report, level)) for level in report.levels()],
        facts={name: value for name, value in report.facts.items() if value not in (None, "", (), [], {})},
    )


def _of(report: Report, level: str) -> list[Result]:
    return [result for result in report.results if result.level == level]


def _share(result: Result) -> float | None:
    """The largest part of a limit that a measurement uses up; None where nothing was measured against one."""
    shares = [each.value / each.limit for each in result.measurements if each.limit]
    return max(shares, default=None)


def _number(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _asset(package: str, name: str) -> str:
    return (resources.files(package) / "assets" / name).read_text(encoding="utf-8")
