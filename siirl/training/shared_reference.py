"""The reference of an actor that trains adapters: the actor without them, so no second model is in memory."""

from __future__ import annotations

from siirl.data.batch import Batch, Ragged
from siirl.model.lora import without_adapters
from siirl.training.fsdp import TrainingEngine


class SharedReference:
    """Log-probs of the weights that the actor's adapters adapt: those that the stage began with."""

    def __init__(self, actor: TrainingEngine) -> None:
        self._actor = actor

    def log_probs(self, batch: Batch, mini_batches: int) -> Ragged:
        """See :meth:`TrainingEngine.log_probs`."""
        with without_adapters(self._actor.model):
            return self._actor.log_probs(batch, mini_batches)
