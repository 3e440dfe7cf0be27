"""Degrees of parallelism that suit a model. Importing this module imports no torch."""

from __future__ import annotations

import math
from typing import Protocol

from siirl.config.schema import ParallelConfig
from siirl.errors import RequestError


class Cuttable(Protocol):
    """What has to divide: a decoder's configuration, or the planner's shape of it."""

    @property
    def num_heads(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def num_experts(self) -> int: ...


def check_model(model: Cuttable, parallel: ParallelConfig) -> None:
    """Refuse degrees that the model's heads and layers cannot be dealt out to.

    Raises:
        RequestError: the first of them, with a value that works.
    """
    tensor, context, key = parallel.tensor, parallel.context, "training.parallel"
    if parallel.expert > 1 and (not model.num_experts or model.num_experts % parallel.expert):
        what = f"which does not divide the model's {model.num_experts} experts"
        what = what if model.num_experts else "but the model has no experts"
        fitting = math.gcd(model.num_experts, parallel.expert) if model.num_experts else 1
        raise RequestError(f"{key}.expert is {parallel.expert}, {what}; set {key}.expert={fitting}")
    heads = {"attention heads": model.num_heads, "key/value heads": model.num_kv_heads}
    for what, count in (heads | {"intermediate values": model.intermediate_size}).items():
        if count % tensor:
            fitting = max(n for n in range(1, tensor) if all(size % n == 0 for size in _sizes(model)))
            raise RequestError(
                f"{key}.tensor is {tensor}, which does not divide the model's {count} {what}; "
                f"set {key}.tensor={fitting}"
            )
    if parallel.context_mode == "ring":
        return
    for what, count in heads.items():
        if count // tensor % context:
            own = f"the model's {count} {what}" if tensor == 1 else f"the {count // tensor} {what} of a worker"
            raise RequestError(f"{key}.context is {context}, which does not divide {own}; set {key}.context_mode=ring")


def _sizes(model: Cuttable) -> tuple[int, int, int]:
    return model.num_heads, model.num_kv_heads, model.intermediate_size
