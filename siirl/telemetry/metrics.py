"""A run's metrics: `metrics.jsonl`, one JSON object a step, and their view in TensorBoard."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from siirl.telemetry.jsonl import encode_line, open_for_append, read_jsonl, rewrite, whole_lines

FILE_NAME = "metrics.jsonl"


class MetricsWriter:
    """Appends a run's steps to `metrics.jsonl`; each line reaches the operating system before `append` returns."""

    def __init__(self, run_dir: Path | str) -> None:
        self._path = Path(run_dir) / FILE_NAME
        self._file = open_for_append(self._path)

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one step. `record` holds `stage` and `step`; a value that is None, NaN or infinite is left out."""
        self._file.write(encode_line({key: value for key, value in record.items() if _has_value(value)}))

    def truncate_after(self, stage: str, step: int) -> None:
        """Drop what a run resumed after `step` of `stage` does again: the stage's later steps and all later stages.

        Stages are ordered as they first appear in the file; with `stage` not among them, all are earlier.
        """
        self._file.close()
        kept: list[bytes] = []
        reached = False
        for line in whole_lines(self._path):
            record = json.loads(line)
            reached = reached or record["stage"] == stage
            if not reached or (record["stage"] == stage and record["step"] <= step):
                kept.append(line)
        rewrite(self._path, kept)
        self._file = open_for_append(self._path)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoardWriter:
    """A view of `metrics.jsonl` for TensorBoard: numeric values under `stage/key`, in `tensorboard/`.

    It starts by writing anew what `metrics.jsonl` holds, so a resumed run shows no step twice. Create it after
    `MetricsWriter.truncate_after`.
    """

    def __init__(self, run_dir: Path | str) -> None:
        from tensorboardX import SummaryWriter  # its import takes more than a second

        folder = Path(run_dir) / "tensorboard"
        for stale in folder.glob("events.out.tfevents.*"):
            stale.unlink()
        self._writer = SummaryWriter(str(folder))
        for record in read_metrics(run_dir):
            self.append(record)

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one step; `record` as for `MetricsWriter.append`."""
        for key, value in record.items():
            if key != "step" and is_number(value) and _has_value(value):
                self._writer.add_scalar(f"{record['stage']}/{key}", value, record["step"])
        self._writer.flush()

    def close(self) -> None:
        """Write what is left and close the files."""
        self._writer.close()


def read_metrics(run_dir: Path | str) -> list[dict[str, Any]]:
    """Read a run's steps, oldest first; none when the file is missing.

    Raises:
        SiirlError: a line other than a half-written last one is not JSON.
    """
    return list(read_jsonl(Path(run_dir) / FILE_NAME))


def is_number(value: object) -> bool:
    """Return whether a metric's value can be plotted."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _has_value(value: object) -> bool:
    return value is not None and not (isinstance(value, float) and not math.isfinite(value))
