"""What the table of kernels costs: a call through it against a direct call of the implementation bound there.

The tensors are so small that the call is a good part of the work.
"""

from __future__ import annotations

import torch

from siirl.bench.measure import Measure, Rate
from siirl.device.backend import Backend
from siirl_kernels import kernels

CALLS = 100


def bench_call_swiglu(measure: Measure, backend: Backend) -> None:
    x, direct = torch.ones(1, 8, device=backend.device()), kernels.swiglu

    def bound() -> None:
        for _ in range(CALLS):
            kernels.swiglu(x, x)

    def directly() -> None:
        for _ in range(CALLS):
            direct(x, x)

    measure(bound, directly, Rate(CALLS, "calls"), against="the function itself")


def bench_call_rms_norm(measure: Measure, backend: Backend) -> None:
    x, weight = torch.ones(1, 8, device=backend.device()), torch.ones(8, device=backend.device())
    direct = kernels.rms_norm

    def bound() -> None:
        for _ in range(CALLS):
            kernels.rms_norm(x, weight, 1e-6)

    def directly() -> None:
        for _ in range(CALLS):
            direct(x, weight, 1e-6)

    measure(bound, directly, Rate(CALLS, "calls"), against="the function itself")
