"""`torch.npu`: the device module, as PyTorch and its users ask for it."""

from __future__ import annotations

import os
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import simulated_npu_device as _device
import torch

Device = torch.device | str | int | None

_initialized = True  # without it torch.utils.checkpoint does not keep this device's random state
Stream = torch.Stream
# The name that HCCL's ordered reductions are decided by; "simulated" so that no record is taken for a real one.
NAME = "Ascend910B (simulated)"
CUBE_CORES, VECTOR_CORES = 24, 48


def _index(device: Device = None) -> int:
    if isinstance(device, int):
        return device
    index = torch.device(device).index if device is not None else None
    return _device.current_device() if index is None else index


def Event(enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> torch.Event:
    """A function, because a subclass of torch.Event cannot measure the time to another."""
    return torch.Event("npu", enable_timing=enable_timing)


def is_available() -> bool:
    return device_count() > 0


def is_initialized() -> bool:
    return True


def init() -> None:
    pass


_lazy_init = init


def _is_in_bad_fork() -> bool:
    return False


def device_count() -> int:
    return _device.device_count()


def current_device() -> int:
    return _device.current_device()


def set_device(device: Device) -> None:
    _device.set_device(_index(device))


class device:
    """Context in which another device is the current one."""

    def __init__(self, device: Device) -> None:
        self._inside = _index(device)

    def __enter__(self) -> None:
        self._outside = _device.current_device()
        _device.set_device(self._inside)

    def __exit__(self, *error: object) -> None:
        _device.set_device(self._outside)


def get_device_name(device: Device = None) -> str:
    return NAME


def get_device_properties(device: Device = None) -> Any:
    total = torch.accelerator.get_memory_info(_index(device))[1]
    return types.SimpleNamespace(
        name=NAME, total_memory=total, L2_cache_size=0, cube_core_num=CUBE_CORES, vector_core_num=VECTOR_CORES
    )


def get_device_capability(device: Device = None) -> None:
    """The real one answers None as well."""


def synchronize(device: Device = None) -> None:
    pass


def current_stream(device: Device = None) -> torch.Stream:
    return torch.accelerator.current_stream(_index(device))


def default_stream(device: Device = None) -> torch.Stream:
    kind = torch.accelerator.current_stream().device_type
    return torch.Stream(stream_id=0, device_index=_index(device), device_type=kind)


def set_stream(stream: torch.Stream) -> None:
    torch.accelerator.set_stream(stream)


@contextmanager
def stream(stream: torch.Stream | None) -> Iterator[None]:
    if stream is None:
        yield
        return
    with stream:
        yield


StreamContext = stream


def memory_allocated(device: Device = None) -> int:
    return torch.accelerator.memory_allocated(_index(device))


def max_memory_allocated(device: Device = None) -> int:
    return torch.accelerator.max_memory_allocated(_index(device))


def memory_reserved(device: Device = None) -> int:
    return torch.accelerator.memory_reserved(_index(device))


def max_memory_reserved(device: Device = None) -> int:
    return torch.accelerator.max_memory_reserved(_index(device))


def memory_stats(device: Device = None) -> dict[str, Any]:
    return torch.accelerator.memory_stats(_index(device))


def reset_peak_memory_stats(device: Device = None) -> None:
    torch.accelerator.reset_peak_memory_stats(_index(device))


def reset_accumulated_memory_stats(device: Device = None) -> None:
    torch.accelerator.reset_accumulated_memory_stats(_index(device))


def mem_get_info(device: Device = None) -> tuple[int, int]:
    return torch.accelerator.get_memory_info(_index(device))


def empty_cache() -> None:
    pass


default_generators = tuple(_device.default_generator(index) for index in range(_device.device_count()))


def get_rng_state(device: Device = "npu") -> torch.Tensor:
    return default_generators[_index(device)].get_state()


def set_rng_state(new_state: torch.Tensor, device: Device = "npu") -> None:
    default_generators[_index(device)].set_state(new_state)


def get_rng_state_all() -> list[torch.Tensor]:
    return [generator.get_state() for generator in default_generators]


def set_rng_state_all(new_states: list[torch.Tensor]) -> None:
    for generator, state in zip(default_generators, new_states, strict=True):
        generator.set_state(state)


def manual_seed(seed: int) -> None:
    default_generators[_device.current_device()].manual_seed(seed)


def manual_seed_all(seed: int) -> None:
    for generator in default_generators:
        generator.manual_seed(seed)


def initial_seed() -> int:
    return default_generators[_device.current_device()].initial_seed()


def is_bf16_supported() -> bool:
    return True


def get_amp_supported_dtype() -> list[torch.dtype]:
    return [torch.float16, torch.bfloat16, torch.float32]


class NPUGraph:
    """Work that is recorded once and done again by `replay`, on the same memory. Its pool has a name and no use."""

    def __init__(self) -> None:
        self._recorded = _device.Graph()
        self._pool = (0, id(self))

    def pool(self) -> tuple[int, int]:
        return self._pool

    def replay(self) -> None:
        with torch.inference_mode():
            self._recorded.replay()


def is_current_stream_capturing() -> bool:
    return _device.Graph.recording()


@contextmanager
def graph(
    npu_graph: NPUGraph, pool: tuple[int, int] | None = None, stream: Any = None, capture_error_mode: str = "global"
) -> Iterator[None]:
    """Records what the block does, besides doing it."""
    assert stream is None and capture_error_mode in ("global", "thread_local", "relaxed")
    if os.environ.get("TASK_QUEUE_ENABLE") == "2":
        raise RuntimeError(
            "Do not support TASK_QUEUE_ENABLE = 2 during NPU graph capture, please export TASK_QUEUE_ENABLE=1/0."
        )
    npu_graph._pool = pool or npu_graph._pool
    npu_graph._recorded.begin()
    try:
        yield
    finally:
        npu_graph._recorded.end()


class _Config:
    """Settings of the extension. Casting to a private memory format does nothing before it is allowed."""

    allow_internal_format = False


config = _Config()
