"""What of a forward pass is kept for the backward pass: `training.recompute`, `training.offload_activations`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from torch import nn

from siirl.config.schema import TrainingConfig
from siirl.device.backend import Backend
from siirl.errors import RequestError
from siirl.model.fallback import TransformersDecoder
from siirl.model.recompute import offload_layers, recompute_layers, selective

log = logging.getLogger(__name__)


def bound_activations(
    model: nn.Module, training: TrainingConfig, backend: Backend
) -> Callable[[], AbstractContextManager[None]]:
    """Prepare a model's layers; the result makes the context of each of its forward passes.

    Raises:
        RequestError: `transformers` runs the model, and recomputation is to be selective.
    """
    if training.recompute == "selective":
        if any(isinstance(part, TransformersDecoder) for part in model.modules()):
            raise RequestError(
                "training.recompute=selective knows siirl's own decoder, and transformers runs this model; "
                "set training.recompute=full"
            )
        return selective
    if training.recompute == "full":
        recompute_layers(model)
    if training.offload_activations:
        if backend.memory().unified:
            log.info("device '%s' computes in the host's memory: nothing is offloaded", backend.name)
        else:
            offload_layers(model, backend.capabilities().pin_memory)
    return nullcontext
