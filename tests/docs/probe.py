"""A node that writes the columns it reads to the run's directory, for tests to look at."""

from __future__ import annotations

import json

from siirl.data.batch import Batch, Ragged
from siirl.worker.context import Context


def probe(batch: Batch, context: Context) -> None:
    """Write ``columns_STEP_RANK.json``: lists by column."""
    columns = {}
    for name in batch:
        column = batch[name]
        columns[name] = [row.tolist() for row in column.rows()] if isinstance(column, Ragged) else column.tolist()
    (context.run_dir / f"columns_{context.step}_{context.collectives.rank}.json").write_text(json.dumps(columns))
