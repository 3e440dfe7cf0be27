"""What the report shows of a run besides numbers: its header, samples, plan and configuration."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from siirl.errors import SiirlError
from siirl.telemetry.jsonl import read_jsonl

SAMPLE_FILES = 20
SAMPLES_PER_FILE = 64
_SAMPLE_CHARACTERS = 16_000_000  # of all samples together: what a browser opens at once
_PLANS_PER_STAGE = 8
_SAMPLE_FILE = re.compile(r"(?:(?P<stage>.+)_)?step_(?P<step>\d+)\.jsonl")


def header(run_dir: Path, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return name, status, device, workers, model, pipeline, duration in seconds, steps and error, as far as known."""
    summary = _read_json(run_dir / "summary.json")
    config = _read_config(run_dir)
    stepped = sum(record.get("time/step_s", 0.0) for record in records)
    seconds = max(summary.get("seconds", 0.0), stepped) or None  # the summary of a resumed run knows its own part
    return {
        "name": str(config.get("name") or run_dir.resolve().name),
        "status": summary.get("status", "unfinished"),
        "error": summary.get("error"),
        "device": summary.get("device", config.get("device")),
        "workers": summary.get("workers", config.get("workers")),
        "model": summary.get("model", (config.get("model") or {}).get("path")),
        "pipeline": config.get("pipeline"),
        "seconds": seconds,
        "steps": len({(record["stage"], record["step"]) for record in records if record["step"] > 0}),
    }


def samples(run_dir: Path) -> dict[str, Any]:
    """Return the newest sample files, oldest first, each sample whole, and how many files and samples are left out."""
    files = _sample_files(run_dir)
    budget = _SAMPLE_CHARACTERS
    shown: list[dict[str, Any]] = []
    for stage, step, file in reversed(files[-SAMPLE_FILES:]):
        rows = list(read_jsonl(file))
        kept: list[dict[str, Any]] = []
        for row in rows[:SAMPLES_PER_FILE]:
            sample = {name: row.get(name) for name in ("sample_id", "prompt", "response", "reward", "answer")}
            # Larger than a script's exact integers, an id survives only as text.
            sample["sample_id"] = str(sample["sample_id"])
            budget -= sum(len(value) for value in sample.values() if isinstance(value, str))
            if budget < 0 and (shown or kept):
                break
            kept.append(sample)
        if kept:
            shown.append({"stage": stage, "step": step, "samples": kept, "left_out": len(rows) - len(kept)})
        if budget < 0:
            break
    return {"files": shown[::-1], "files_left_out": len(files) - len(shown)}


def plan(run_dir: Path) -> dict[str, Any]:
    """Return every stage's distinct plans, each with the ranks that run it."""
    content = _read_json(run_dir / "plan.json")
    stages = []
    for stage in content.get("stages", []):
        ranks_by_plan: dict[str, list[int]] = {}
        for worker in stage["plans"]:
            ranks_by_plan.setdefault(json.dumps(worker["steps"]), []).append(worker["rank"])
        distinct = [{"ranks": _ranges(ranks), "steps": json.loads(steps)} for steps, ranks in ranks_by_plan.items()]
        left_out = max(0, len(distinct) - _PLANS_PER_STAGE)
        stages.append({"stage": stage["stage"], "plans": distinct[:_PLANS_PER_STAGE], "left_out": left_out})
    return {"pipeline": content.get("pipeline"), "workers": content.get("workers"), "stages": stages}


def config_text(run_dir: Path) -> str:
    """Return the resolved configuration as written; empty when the file is missing."""
    file = run_dir / "config.yaml"
    return file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_bytes()) if file.exists() else {}
    except ValueError as error:
        raise SiirlError(f"{file} is not JSON ({error}); remove it to do without") from error


def _read_config(run_dir: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(config_text(run_dir))
    except yaml.YAMLError as error:
        raise SiirlError(f"{run_dir / 'config.yaml'} is not YAML ({error}); remove it to do without") from error
    return content if isinstance(content, dict) else {}


def _sample_files(run_dir: Path) -> list[tuple[str, int, Path]]:
    """List stage, step and path: warm-ups in the order of their numbers, then the main stage."""
    found = []
    for file in (run_dir / "samples").glob("*.jsonl"):
        if match := _SAMPLE_FILE.fullmatch(file.name):
            found.append((match["stage"] or "main", int(match["step"]), file))
    return sorted(found, key=lambda entry: (entry[0] == "main", _numbers(entry[0]), *entry))


def _numbers(text: str) -> list[int]:
    return [int(digits) for digits in re.findall(r"\d+", text)]


def _ranges(ranks: Sequence[int]) -> str:
    """Write ranks as `0-3, 5`."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    return ", ".join(str(low) if low == high else f"{low}–{high}" for low, high in runs)
