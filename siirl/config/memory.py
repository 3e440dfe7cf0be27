"""Which keys about training's memory go together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from siirl.errors import RequestError

if TYPE_CHECKING:
    from siirl.config.schema import TrainingConfig


def check_memory_keys(training: TrainingConfig, workers: int) -> None:
    """Refuse keys that cannot work together.

    Args:
        training: of a stage.
        workers: that train.

    Raises:
        RequestError: what to set instead.
    """
    if training.cpu_offload and (training.sharding != "shard" or workers == 1 or training.engine != "fsdp"):
        raise RequestError(
            "training.cpu_offload is a part of FSDP2's sharding; set training.engine=fsdp, training.sharding=shard and "
            "workers=2 or more, or leave it out"
        )
    if training.recompute == "selective" and training.offload_activations:
        raise RequestError(
            "training.offload_activations moves what layers keep, and training.recompute=selective holds on to it; "
            "set training.recompute=none or full"
        )
    if training.recompute == "selective" and training.compile:
        raise RequestError(
            "training.compile makes layers' cheap ops part of graphs that decide for themselves what they keep; set "
            "training.recompute=none or full, or training.compile=false"
        )
