"""Filters: which samples of a step go on to training."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from siirl.config.schema import AlgorithmConfig
from siirl.data.batch import Batch
from siirl.errors import RequestError, did_you_mean
from siirl.user_code import load_function

FilterFn = Callable[[Batch, AlgorithmConfig], Tensor]
"""From a worker's batch, bool [rows]: True where the sample is kept. Sees whole groups."""

_FILTERS: dict[str, FilterFn] = {}


def sample_filter(name: str) -> Callable[[FilterFn], FilterFn]:
    """Register a filter for nodes with ``op: filter`` and ``params: {name: …}``."""

    def register(function: FilterFn) -> FilterFn:
        _FILTERS[name] = function
        return function

    return register


def get_filter(name: str) -> FilterFn:
    """The filter registered as ``name``, or of the form ``file.py:function``; RequestError when there is none."""
    if ":" in name:
        return load_function(name, "filter")
    if name not in _FILTERS:
        raise RequestError(f"there is no filter '{name}'{did_you_mean(name, _FILTERS)}")
    return _FILTERS[name]


@sample_filter("reward_variance")
def reward_variance(batch: Batch, config: AlgorithmConfig) -> Tensor:
    """Keep groups whose rewards differ: the others have advantage 0 (DAPO, arXiv 2503.14476, section 3.2)."""
    reward, valid = batch.dense("reward"), ~batch.dense("failed")
    _, group = batch.dense("group_id").unique(return_inverse=True)
    groups = int(group.max()) + 1 if len(group) else 0
    high = torch.full((groups,), -torch.inf).scatter_reduce(0, group[valid], reward[valid], "amax")
    low = torch.full((groups,), torch.inf).scatter_reduce(0, group[valid], reward[valid], "amin")
    return (high > low)[group] & valid
