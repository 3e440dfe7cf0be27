"""Where a run's time went, for the report: seconds of every node per step, and the newest steps' timelines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from siirl.telemetry.jsonl import read_jsonl
from siirl.telemetry.metrics import is_number
from siirl.telemetry.trace import worker_files

TIMELINE_STEPS = 100
TIMELINE_WORKERS = 32
_SPANS_PER_ROW = 200
_BARS = 240
_CLOCK_US = 1.0  # time stamps since 1970 are exact to about a quarter of a microsecond

StepKey = tuple[str, int]  # stage, step


@dataclass
class Span:
    """A node's run in a step; `own` is its duration less that of the spans inside it. Microseconds."""

    name: str
    start: float
    duration: float
    depth: int = 0
    own: float = 0.0


def time_section(run_dir: Path, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return nodes, one stacked bar per step (or run of steps) and the newest steps' timelines.

    Without traces the bars are the metrics' `time/..._s` and there is no timeline.
    """
    files = worker_files(run_dir)
    by_worker = {int(file.stem.removeprefix("worker_")): step_spans(file) for file in files}
    keys = list(dict.fromkeys(key for steps in by_worker.values() for key in steps))
    order = {stage: index for index, stage in enumerate(dict.fromkeys(stage for stage, _ in keys))}
    keys.sort(key=lambda key: (order[key[0]], key[1]))
    shares = [(key, _mean_seconds([steps.get(key, []) for steps in by_worker.values()])) for key in keys]
    if not keys:
        shares = [((record["stage"], record["step"]), _metric_seconds(record)) for record in records]
    nodes = list(dict.fromkeys(name for _, seconds in shares for name in seconds))
    shown = {rank: steps for rank, steps in by_worker.items() if rank < TIMELINE_WORKERS}
    return {
        "nodes": nodes,
        "bars": _bars(shares, nodes),
        "timeline": [_timeline(key, shown, nodes) for key in keys[-TIMELINE_STEPS:]],
        "steps_left_out": max(0, len(keys) - TIMELINE_STEPS),
        "workers_left_out": len(by_worker) - len(shown),
        "traced": bool(keys),
    }


def step_spans(file: Path) -> dict[StepKey, list[Span]]:
    """Read one worker's spans by step, nested.

    A resumed run goes over steps again in the same file: what was done of them before is left out.
    """
    spans: dict[StepKey, list[Span]] = {}
    last: StepKey | None = None
    for event in read_jsonl(file):
        arguments = event.get("args", {})
        if "step" not in arguments:
            continue
        key = (arguments.get("stage", "main"), arguments["step"])
        if key in spans and key != last:
            keys = list(spans)
            for repeated in keys[keys.index(key) :]:
                del spans[repeated]
        spans.setdefault(key, []).append(Span(event["name"], event["ts"], event["dur"]))
        last = key
    return {key: nest(step) for key, step in spans.items()}


def nest(spans: Sequence[Span]) -> list[Span]:
    """Order spans by start and fill in their depth and own time; own times add up without counting anything twice."""
    ordered = sorted(spans, key=lambda span: (span.start, -span.duration))
    around: list[Span] = []
    for span in ordered:
        while around and around[-1].start + around[-1].duration <= span.start + _CLOCK_US:
            around.pop()
        span.depth = len(around)
        span.own = span.duration
        if around:
            around[-1].own -= span.duration
        around.append(span)
    return ordered


def _mean_seconds(workers: Sequence[Sequence[Span]]) -> dict[str, float]:
    seconds: dict[str, float] = {}
    for spans in workers:
        for span in spans:
            seconds[span.name] = seconds.get(span.name, 0.0) + span.own / 1e6 / len(workers)
    return seconds


def _metric_seconds(record: Mapping[str, Any]) -> dict[str, float]:
    seconds = {
        key.removeprefix("time/").removesuffix("_s"): value
        for key, value in record.items()
        if key.startswith("time/") and key != "time/step_s" and is_number(value)
    }
    if is_number(step := record.get("time/step_s")):
        seconds["other"] = max(0.0, step - sum(seconds.values()))
    return seconds


def _bars(shares: Sequence[tuple[StepKey, dict[str, float]]], nodes: Sequence[str]) -> list[dict[str, Any]]:
    """Average neighbouring steps of a stage so that there are about `_BARS` bars at most."""
    width = -(-len(shares) // _BARS)
    groups: list[list[tuple[StepKey, dict[str, float]]]] = []
    for share in shares:
        if not groups or len(groups[-1]) == width or groups[-1][0][0][0] != share[0][0]:
            groups.append([])
        groups[-1].append(share)
    return [
        {
            "stage": group[0][0][0],
            "step": group[0][0][1],
            "last": group[-1][0][1],
            "seconds": [
                float(f"{sum(seconds.get(node, 0.0) for _, seconds in group) / len(group):.4g}") for node in nodes
            ],
        }
        for group in groups
    ]


def _timeline(
    key: StepKey, workers: Mapping[int, Mapping[StepKey, Sequence[Span]]], nodes: Sequence[str]
) -> dict[str, Any]:
    """Return a step's spans by worker: [node, start, duration, depth] in seconds after the step's first span."""
    numbers = {node: index for index, node in enumerate(nodes)}
    start = min((span.start for steps in workers.values() for span in steps.get(key, [])), default=0.0)
    rows = []
    for rank, steps in workers.items():
        longest = sorted(steps.get(key, []), key=lambda span: -span.duration)[:_SPANS_PER_ROW]
        spans = [
            [numbers[span.name], round((span.start - start) / 1e6, 6), round(span.duration / 1e6, 6), span.depth]
            for span in sorted(longest, key=lambda span: (span.depth, span.start))
        ]
        rows.append({"rank": rank, "spans": spans, "left_out": len(steps.get(key, [])) - len(spans)})
    return {"stage": key[0], "step": key[1], "rows": rows}
