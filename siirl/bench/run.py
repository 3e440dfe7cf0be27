"""A run of ``siirl bench``."""

from __future__ import annotations

from siirl.device.backend import Backend
from siirl_kernels import bind


def make_ready(backend: Backend, local_rank: int = 0) -> Backend:
    """Set up this process as a run's worker does, on one thread: other cores may be busy, and differ in number."""
    backend.bind(local_rank, threads=1)
    backend.deterministic("on")
    backend.seed(0)
    bind(backend.kernel_order())
    return backend
