"""`training.micro_batch_tokens: auto`: how many tokens' activations fit beside what a worker holds in any case.

A function of the models, the keys and the memory alone, so that all workers, and `siirl plan`, find the same number.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from siirl.config.schema import TrainingConfig
from siirl.planning.shape import ModelShape, Numbers

SHARE = 0.8
"""Of a worker's memory that is planned with: allocators leave gaps, and libraries take their part."""

STEP, MOST = 512, 65_536
"""The number is a multiple of the first, and at most the second: longer micro-batches compute no faster."""

# Elements of a chunk of logits, and how many chunks are kept: `kernels/siirl_kernels/linear_log_prob.py`.
CHUNK, KEPT_CHUNKS = 16 * 2**20, 2


@dataclass(frozen=True)
class Held:
    """A model that a worker holds: its parameters over all workers, and how many of them are trained."""

    parameters: float
    trained: float


def saved_per_token(shape: ModelShape, numbers: Numbers, training: TrainingConfig, layers: int, unified: bool) -> float:
    """Bytes that wait for the backward pass, of one token and so many layers; `unified` devices have only a host's."""
    kept = layers * shape.saved_bytes(numbers, training.recompute)
    if training.offload_activations and not unified:
        kept = shape.saved_bytes(numbers)  # a layer's at a time, on their way
    elif training.recompute == "full":
        kept += shape.saved_bytes(numbers)  # of the layer that runs again
    return float(kept + 4 * 4 * shape.hidden_size)


def working_set(shape: ModelShape, itemsize: int) -> float:
    """Bytes of one token in a layer that keeps nothing: input, normalised input and result in float32, three of the
    MLP's."""
    width = shape.experts_per_token * shape.expert_size if shape.num_experts else shape.intermediate_size
    return float(3 * 4 * shape.hidden_size + 3 * itemsize * width)


def auto_tokens(
    shape: ModelShape,
    models: Iterable[Held],
    training: TrainingConfig,
    memory: float,
    shards: int,
    longest: int,
    *,
    unified: bool,
) -> int:
    """Tokens of a micro-batch.

    Args:
        shape: of the actor.
        models: all that a worker has.
        training: of the stage.
        memory: bytes that one worker may use.
        shards: workers over which the models are sharded; 1: each holds them whole.
        longest: tokens of the longest sample; there are never fewer.
        unified: the device computes in the host's memory.
    """
    itemsize = 2 if training.dtype == "bfloat16" else 4
    numbers: Numbers = "float32" if itemsize == 4 else "bfloat16"
    fixed = 4.0 * CHUNK * (3 + KEPT_CHUNKS) + 4 * shape.embedding_parameters
    states = 8 if training.optimizer == "adamw" else 0
    for held in models:
        on_device = not training.cpu_offload or unified
        fixed += on_device * (4 * held.parameters + (4 + states) * held.trained) / shards
    # sharded gradients wait whole between micro-batches; replicated ones are copied into the bucket that travels;
    # a rollout engine's or an optimiser's copy of the weights is as large as either
    fixed += 4 * shape.parameters
    if shards > 1:
        fixed += itemsize * (shape.embedding_parameters + shape.head_parameters + 2 * shape.layer_parameters)
    elif itemsize == 2:
        fixed += itemsize * shape.parameters
    one = saved_per_token(shape, numbers, training, shape.num_layers, unified) + working_set(shape, itemsize)
    fitting = int(max(0.0, SHARE * memory - fixed) / one) // STEP * STEP
    return max(longest, min(fitting, MOST))
