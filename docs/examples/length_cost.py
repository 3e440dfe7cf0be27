"""A node of one's own: every token of a response costs a little of its reward."""

from __future__ import annotations

from torch import Tensor

from siirl.data.batch import Batch
from siirl.worker.context import Context


def length_cost(batch: Batch, context: Context, *, per_token: float = 0.01) -> dict[str, Tensor]:
    """Read reward, failed and response_ids; write shaped_reward, float32 [rows]."""
    shaped = batch.dense("reward") - per_token * batch.lengths("response_ids")
    scored = shaped[~batch.dense("failed")]
    context.metrics.mean("reward/shaped_mean", float(scored.sum()), len(scored))
    return {"shaped_reward": shaped}
