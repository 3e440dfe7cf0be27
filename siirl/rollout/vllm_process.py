"""A worker's process as vLLM's host: what vLLM changes in it while it starts or runs is put back."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from siirl.device.backend import Backend

# What vLLM reads when it starts, unless the user has set it.
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine's core in this process
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # threads are the launcher's business
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}


@contextmanager
def starting(backend: Backend, tensor: int) -> Iterator[None]:
    """Make vLLM's start leave the process as it was: environment, threads, random numbers, default process group.

    vLLM's own variables stay, since it reads some of them later.
    """
    threads, set_threads, random_state = torch.get_num_threads(), torch.set_num_threads, backend.rng_state()
    python_state, numpy_state, environment = random.getstate(), np.random.get_state(), dict(os.environ)
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        with _world(backend, tensor):
            yield
    finally:
        kept = {name: value for name, value in os.environ.items() if name.startswith("VLLM_")}
        os.environ.clear()
        os.environ.update(environment | kept)
        torch.set_num_threads = set_threads
        torch.set_num_threads(threads)
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        backend.set_rng_state(random_state)


@contextmanager
def guest_random_state() -> Iterator[None]:
    """Put the host's random numbers back: vLLM's sampler draws from them on the host even where every row is seeded."""
    with torch.random.fork_rng(devices=[]):
        yield


@contextmanager
def _world(backend: Backend, tensor: int) -> Iterator[None]:
    """The process group that vLLM's workers are to be: this worker alone, or the run's for tensor parallelism.

    vLLM takes all workers of PyTorch's default group for its own, and makes groups of them, which needs every one of
    them: a worker that trains would be waited for in vain.
    """
    device = backend.device()
    os.environ["LOCAL_RANK"] = str(device.index or 0)
    if tensor > 1:
        os.environ["RANK"] = str(dist.get_rank())
        yield
        return
    os.environ["RANK"] = "0"
    outer = dist.group.WORLD if dist.is_initialized() else None
    c10d._update_default_pg(None)  # PyTorch has no public way to have two
    try:
        dist.init_process_group(backend.communication().torch_backend, store=dist.HashStore(), rank=0, world_size=1)
        yield
    finally:
        c10d._update_default_pg(outer)
