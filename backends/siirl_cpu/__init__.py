"""The CPU as a device: the host itself, always there, and the reference for every other back end."""

from __future__ import annotations

import importlib
import time
from typing import TYPE_CHECKING, Any

from siirl.device import Capabilities, CommSpec, EngineSpec, MemoryInfo, Probe, TorchBackend, Unsupported, host
from siirl.device.backend import HOST_DTYPES

if TYPE_CHECKING:
    from torch import Tensor
    from torch import device as Device

# Features of /proc/cpuinfo that multiply a dtype in hardware; elsewhere PyTorch widens it to float32.
HARDWARE = {"bfloat16": {"avx512_bf16", "amx_bf16", "bf16"}, "float16": {"avx512_fp16", "amx_fp16", "asimdhp"}}


class HostStream:
    """Work on the host is done when the call returns, so a stream of it has nothing to wait for."""

    def __enter__(self) -> HostStream:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def wait_stream(self, stream: HostStream) -> None:
        pass

    def wait_event(self, event: HostEvent) -> None:
        pass

    def record_event(self, event: HostEvent | None = None) -> HostEvent:
        event = event or HostEvent(timing=False)
        event.record(self)
        return event


class HostEvent:
    """A moment of the host's clock."""

    def __init__(self, timing: bool) -> None:
        self._timing = timing
        self._time: float | None = None

    def record(self, stream: HostStream | None = None) -> None:
        self._time = time.perf_counter()

    def query(self) -> bool:
        return True

    def wait(self, stream: HostStream | None = None) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: HostEvent) -> float:
        """Milliseconds from this event to `end`."""
        if not (self._timing and end._timing):
            raise Unsupported("an event measures time only when it was made with timing=True")
        if self._time is None or end._time is None:
            raise Unsupported("an event has a time only after record()")
        return (end._time - self._time) * 1e3


class CpuBackend(TorchBackend):
    name = "cpu"
    torch_type = "cpu"

    @classmethod
    def probe(cls) -> Probe:
        torch = host.installed("torch")
        missing = [] if torch else [("PyTorch is not installed", "pip install torch")]
        found = f"{host.cpu_name()}, {host.usable_cores()} cores, {host.memory_total() / 2**30:.1f} GiB"
        return Probe.of(found, 1, {"torch": torch} if torch else {}, missing)

    @classmethod
    def visible_devices_env(cls) -> str:
        return ""

    @classmethod
    def launcher_resources(cls, n: int) -> dict[str, Any]:
        return {"num_cpus": n}

    @classmethod
    def kernel_order(cls) -> list[str]:
        return ["native", "torch"]

    @classmethod
    def engines(cls) -> list[EngineSpec]:
        # Compiled code would keep the packed weights it was traced with. In small blocks short prompts are shared too.
        # A prompt in chunks needs random generators that can be set back, which the host's cannot.
        vllm = {"enforce_eager": True, "block_size": 32, "enable_chunked_prefill": False}
        return [EngineSpec("rollout", "native"), EngineSpec("rollout", "vllm", vllm), EngineSpec("training", "fsdp")]

    def load(self) -> None:
        self._torch = importlib.import_module("torch")
        for provider in ("native", "invariant"):
            importlib.import_module(f"siirl_kernels.{provider}")

    def _bind_device(self, local_rank: int) -> None:
        host.keep_freed_memory()  # every worker of a node shares the host

    def device(self) -> Device:
        return self.torch.device("cpu")

    def synchronize(self) -> None:
        pass

    def capabilities(self) -> Capabilities:
        flags = host.cpu_flags()
        fast = tuple(dtype for dtype, features in HARDWARE.items() if features & flags)
        return Capabilities(
            device_name=host.cpu_name(),
            memory_bytes=host.memory_total(),
            compute_units=host.usable_cores(),
            compute_dtypes=("float64", "float32", "bfloat16", "float16"),
            fast_dtypes=("float64", "float32", *fast),
        )

    def communication(self) -> CommSpec:
        moved = dict.fromkeys(("all_reduce", "all_to_all", "broadcast"), HOST_DTYPES)
        return CommSpec("gloo", moved)

    def _generator_states(self) -> dict[str, Tensor]:
        return {"host": self.torch.get_rng_state()}

    def memory(self) -> MemoryInfo:
        resident, peak = host.process_memory()
        free, total = host.memory_available(), host.memory_total()
        return MemoryInfo(free, total, allocated=resident, reserved=resident, peak=peak, host_peak=peak, unified=True)

    def reset_peak_memory(self) -> bool:
        return host.reset_process_peak()

    def empty_cache(self) -> None:
        host.release_free_memory()

    def stream(self) -> HostStream:
        return HostStream()

    def event(self, timing: bool = False) -> HostEvent:
        return HostEvent(timing)

    def profiler(self, **options: Any) -> Any:
        profiler = self.torch.profiler
        return profiler.profile(activities=[profiler.ProfilerActivity.CPU], **options)
