"""The report's curves and headline numbers, from a run's metrics."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from siirl.telemetry.metrics import is_number

POINTS_PER_CURVE = 2000
_MORE_CURVES = 60

Records = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Curve:
    """One chart: a title, the metrics it draws, and how."""

    title: str
    keys: tuple[str, ...]
    note: str = ""
    band: str | None = None  # a metric drawn as a band of plus and minus its value around the first key
    log: bool = False


CURVES = (
    Curve("Reward", ("reward/mean",), "mean over the step's samples ± one deviation", "reward/std"),
    Curve("Held-out reward", ("eval/reward_mean",), "greedy, on rows that are not trained on"),
    Curve("Response length", ("response/length_mean",), "tokens, mean over the step's samples"),
    Curve("KL", ("actor/kl",), "nats per token, to the reference or the old policy"),
    Curve("Entropy", ("actor/entropy",), "nats per token"),
    Curve(
        "Log-prob gap",
        ("rollout/logprob_diff_max", "rollout/logprob_diff_mean"),
        "rollout against training, nats",
        log=True,
    ),
    Curve("Gradient norm", ("actor/grad_norm",), "before clipping"),
    Curve("Loss", ("actor/loss",)),
    Curve("Throughput", ("throughput/tokens_per_s",), "prompt and response tokens per second"),
)


def stage_names(records: Records) -> list[str]:
    """Return the stages in the order they first appear."""
    return list(dict.fromkeys(record["stage"] for record in records))


def stage_ranges(records: Records) -> list[dict[str, Any]]:
    """Return every stage's name and the first and last step it has a line for."""
    ranges = []
    for name in stage_names(records):
        steps = [record["step"] for record in records if record["stage"] == name]
        ranges.append({"name": name, "first": min(steps), "last": max(steps)})
    return ranges


def curves(records: Records) -> dict[str, Any]:
    """Return the charts that have values: `main` as listed above, `more` for every other numeric metric."""
    known = {key for curve in CURVES for key in (*curve.keys, curve.band)}
    others = sorted({key for record in records for key, value in record.items() if is_number(value)} - known - {"step"})
    more = [Curve(key, (key,)) for key in others[:_MORE_CURVES]]
    return {
        "main": [drawn for curve in CURVES if (drawn := _draw(curve, records))],
        "more": [drawn for curve in more if (drawn := _draw(curve, records))],
        "left_out": others[_MORE_CURVES:],
    }


def headline_numbers(records: Records) -> list[dict[str, Any]]:
    """Return the last stage's final numbers: label, value and, where it tells something, what it was or a note."""
    stages = stage_names(records)
    last = [record for record in records if record["stage"] == stages[-1]] if stages else []
    tiles = []
    for label, key in (("Reward", "reward/mean"), ("Held-out reward", "eval/reward_mean")):
        if found := _values(last, key):
            tiles.append({"label": label, "value": found[-1]} | ({"was": found[0]} if len(found) > 1 else {}))
    if found := _values(last, "response/length_mean"):
        tiles.append({"label": "Length", "value": found[-1], "unit": "tokens", "was": found[0]})
    if found := _values(last, "actor/kl"):
        tiles.append({"label": "KL", "value": found[-1], "unit": "nats"})
    if found := _values(last, "throughput/tokens_per_s"):
        tiles.append({"label": "Speed", "value": statistics.median(found), "unit": "tokens/s", "note": "median"})
    if found := _values(last, "rollout/logprob_diff_max"):
        tiles.append({"label": "Log-prob gap", "value": max(found), "note": "largest of the run"})
    if not any(tile["label"] == "Reward" for tile in tiles) and (found := _values(last, "actor/loss")):
        tiles.insert(0, {"label": "Loss", "value": found[-1], "was": found[0]})
    return tiles


def downsample(values: Sequence[float], limit: int) -> list[int]:
    """Return at most `limit` ascending indices: both ends, and every bucket's least and greatest value between them."""
    count = len(values)
    if count <= limit:
        return list(range(count))
    buckets = (limit - 2) // 2
    edges = [1 + bucket * (count - 2) // buckets for bucket in range(buckets + 1)]
    kept = {0, count - 1}
    for low, high in zip(edges, edges[1:], strict=False):
        kept.add(min(range(low, high), key=values.__getitem__))
        kept.add(max(range(low, high), key=values.__getitem__))
    return sorted(kept)


def _draw(curve: Curve, records: Records) -> dict[str, Any] | None:
    series = [drawn for key in curve.keys if (drawn := _series(key, curve.band, records))]
    if not series:
        return None
    return {"title": curve.title, "note": curve.note, "log": curve.log, "series": series}


def _series(key: str, band: str | None, records: Records) -> dict[str, Any] | None:
    stages = {name: index for index, name in enumerate(stage_names(records))}
    rows = [record for record in records if is_number(record.get(key))]
    rows = [rows[index] for index in downsample([row[key] for row in rows], POINTS_PER_CURVE)]
    if not rows:
        return None
    drawn = {
        "key": key,
        "stage": [stages[row["stage"]] for row in rows],
        "step": [row["step"] for row in rows],
        "value": [_short(row[key]) for row in rows],
    }
    if band is not None and any(is_number(row.get(band)) for row in rows):
        drawn["band"] = [_short(row[band]) if is_number(row.get(band)) else None for row in rows]
    return drawn


def _values(records: Records, key: str) -> list[float]:
    return [record[key] for record in records if is_number(record.get(key))]


def _short(value: float) -> float:
    """Six significant digits: more than a screen shows, and a third of the page's size."""
    return float(f"{value:.6g}")
