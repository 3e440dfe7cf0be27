"""The report: one self-contained page about a run, which loads nothing and runs no script but its own.

Text of a model reaches the page only as data: JSON in which `<`, `>` and `&` are escaped, put into the document as
text. The content security policy admits this page's own script and style by their hashes and nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from importlib import resources
from pathlib import Path
from typing import Any

from siirl.errors import RequestError
from siirl.telemetry import report_run
from siirl.telemetry.metrics import read_metrics
from siirl.telemetry.report_curves import curves, headline_numbers, stage_ranges
from siirl.telemetry.report_time import time_section

_SCRIPTS = ("dom.js", "chart.js", "time.js", "samples.js", "page.js")


def write_report(run_dir: Path, output: Path | None = None) -> Path:
    """Write a run's report and return its path, `report.html` in the run's directory by default.

    What the directory lacks, the page leaves out; the run need not have ended.

    Raises:
        RequestError: `run_dir` is no directory.
        SiirlError: one of its files cannot be read.
    """
    if not run_dir.is_dir():
        raise RequestError(f"{run_dir} is not a run's directory; name the folder that holds metrics.jsonl")
    target = output or run_dir / "report.html"
    target.parent.mkdir(parents=True, exist_ok=True)
    page = render(report_data(run_dir))
    temporary = target.with_name(target.name + ".tmp")
    temporary.write_bytes(page.encode("utf-8", errors="replace"))
    temporary.replace(target)
    return target


def report_data(run_dir: Path) -> dict[str, Any]:
    """Gather what the page shows, as JSON values."""
    records = read_metrics(run_dir)
    return {
        "header": report_run.header(run_dir, records),
        "numbers": headline_numbers(records),
        "stages": stage_ranges(records),
        "curves": curves(records),
        "time": time_section(run_dir, records),
        "samples": report_run.samples(run_dir),
        "plan": report_run.plan(run_dir),
        "config": report_run.config_text(run_dir),
    }


def render(data: dict[str, Any]) -> str:
    """Fill the page's template with data, style and script."""
    script = "\n".join(_asset(name) for name in _SCRIPTS)
    script = f'"use strict";\n(() => {{\n{script}\n}})();\n'
    style = _asset("report.css")
    parts = {
        "policy": f"default-src 'none'; base-uri 'none'; form-action 'none'; "
        f"script-src '{_hash(script)}'; style-src '{_hash(style)}'",
        "title": html.escape(f"{data['header']['name']} · siirl"),
        "style": style,
        "data": embed_json(data),
        "script": script,
    }
    # One pass over the template: what is filled in is never read as template again.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _asset("report.html"))


def embed_json(data: Any) -> str:
    """Encode as JSON that is safe inside a `<script>` element: ASCII only, without `<`, `>` and `&`."""
    text = json.dumps(data, ensure_ascii=True, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _asset(name: str) -> str:
    return (resources.files("siirl.telemetry") / "assets" / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
