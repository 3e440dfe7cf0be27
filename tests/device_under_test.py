"""The device that tests of kernels, models and engines run on: the host, or what SIIRL_TEST_DEVICE names."""

from __future__ import annotations

import functools
import os

import torch

from siirl.device import select
from siirl.device.backend import Backend
from siirl_kernels import bind

NAME = os.environ.get("SIIRL_TEST_DEVICE", "cpu")


@functools.cache
def backend() -> Backend:
    """Its back end, bound to its first device, and the kernels that it prefers."""
    chosen = select(NAME)
    chosen.bind(0)
    bind(chosen.kernel_order())
    return chosen


def device() -> torch.device:
    return backend().device()
