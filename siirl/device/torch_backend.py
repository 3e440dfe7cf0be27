"""Everything of the contract that PyTorch already abstracts over devices, so that a vendor's plug-in stays short.

Built on `torch.accelerator` and, where that has nothing (randomness, properties), on the device's own module as
`torch.get_device_module` finds it. Importing this module imports no torch: a plug-in subclasses at stage 0.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from siirl.device.backend import Backend, Captured, Determinism, MemoryInfo, Result, RngState, Unsupported
from siirl.device.host import process_memory
from siirl.errors import DeviceError, RequestError

if TYPE_CHECKING:
    from torch import Tensor
    from torch import device as Device
    from torch import dtype as Dtype


class TorchBackend(Backend):
    """An accelerator that PyTorch knows by `torch_type`. A vendor adds stage 0, the facts and what differs."""

    _torch: Any = None
    _side: Any = None  # the stream that records: libraries keep a workspace for every stream they have seen

    @property
    def torch(self) -> Any:
        """PyTorch, once loaded."""
        assert self._torch is not None, f"load() of back end '{self.name}' was not called"
        return self._torch

    @property
    def module(self) -> Any:
        """The device's own module of PyTorch."""
        return self.torch.get_device_module(self.torch_type)

    def load(self) -> None:
        self._torch = importlib.import_module("torch")
        for plugin in self.torch_plugins:
            self._import_plugin(plugin)
        accelerator = self.torch.accelerator.current_accelerator(check_available=True)
        if accelerator is None or accelerator.type != self.torch_type:
            found = f"it finds '{accelerator.type}' instead" if accelerator else "it finds no accelerator"
            raise DeviceError(
                f"device '{self.name}' cannot be opened: PyTorch {self.torch.__version__} was asked for "
                f"'{self.torch_type}', but {found}; `siirl doctor` lists what was looked for"
            )

    def _import_plugin(self, plugin: str) -> None:
        try:
            importlib.import_module(plugin)
        except (ImportError, RuntimeError, OSError) as error:  # a missing library, a second accelerator, a bad driver
            raise DeviceError(f"device '{self.name}' cannot be opened: importing {plugin} failed: {error}") from error

    def bind(self, local_rank: int, threads: int | None = None) -> None:
        if threads is not None:
            self.torch.set_num_threads(threads)
        self._bind_device(local_rank)

    def _bind_device(self, local_rank: int) -> None:
        count = self.torch.accelerator.device_count()
        if local_rank >= count:
            variable = self.visible_devices_env()
            raise DeviceError(
                f"worker {local_rank} of this node, counted from 0, needs a device of its own and {count} are visible: "
                f"start at most {count} workers per node, or list more devices in {variable}"
            )
        self.torch.accelerator.set_device_index(local_rank)

    def device(self) -> Device:
        return self.torch.device(self.torch_type, self.torch.accelerator.current_device_index())

    def synchronize(self) -> None:
        self.torch.accelerator.synchronize()

    def seed(self, n: int) -> None:
        self.torch.manual_seed(n)

    def rng_state(self) -> RngState:
        states = {name: bytes(state.numpy()) for name, state in self._generator_states().items()}
        return RngState(self.name, states)

    def set_rng_state(self, state: RngState) -> None:
        if state.backend != self.name:
            raise RequestError(
                f"the random state saved on device '{state.backend}' means nothing to '{self.name}': seed anew instead"
            )
        tensors = {
            name: self.torch.frombuffer(bytearray(data), dtype=self.torch.uint8) for name, data in state.states.items()
        }
        self.torch.set_rng_state(tensors["host"])
        if "device" in tensors:
            self.module.set_rng_state(tensors["device"])

    def _generator_states(self) -> dict[str, Tensor]:
        return {"host": self.torch.get_rng_state(), "device": self.module.get_rng_state()}

    def memory(self) -> MemoryInfo:
        accelerator = self.torch.accelerator
        free, total = accelerator.get_memory_info()
        return MemoryInfo(
            free=free,
            total=total,
            allocated=accelerator.memory_allocated(),
            reserved=accelerator.memory_reserved(),
            peak=accelerator.max_memory_allocated(),
            host_peak=process_memory()[1],
            unified=False,
        )

    def reset_peak_memory(self) -> bool:
        self.torch.accelerator.reset_peak_memory_stats()
        return True

    def empty_cache(self) -> None:
        self.torch.accelerator.empty_cache()

    def autocast(self, dtype: Dtype) -> AbstractContextManager[Any]:
        name = str(dtype).removeprefix("torch.")
        if name == "float32":
            return nullcontext()
        halves = {"bfloat16", "float16"} & set(self.capabilities().compute_dtypes)
        if name not in halves:
            known = ", ".join(["float32", *sorted(halves)])
            raise Unsupported(f"mixed precision in {name} does not work on device '{self.name}'; it has {known}")
        return self.torch.autocast(self.torch_type, dtype=dtype)

    def deterministic(self, level: Determinism) -> list[str]:
        if level not in ("off", "on", "strict"):
            raise ValueError(f"determinism is off, on or strict, not '{level}'")
        # as use_deterministic_algorithms, which imports the compiler besides, for a flag of its own: a second
        self.torch.set_deterministic_debug_mode({"off": "default", "on": "warn", "strict": "error"}[level])
        # Filling fresh tensors with NaN finds reads of memory nobody wrote; that is a search for bugs, at a price.
        self.torch.utils.deterministic.fill_uninitialized_memory = level == "strict"
        return []

    def _set_switches(self, wanted: Mapping[str, str], late: bool) -> list[str]:
        """Set variables that a library reads when it is first used, where the user set none.

        What another value or `late`, the library being in use already, prevents is returned as a sentence.
        """
        missing = {key: value for key, value in wanted.items() if os.environ.get(key) != value}
        open_ones = {} if late else {key: value for key, value in missing.items() if key not in os.environ}
        os.environ.update(open_ones)
        unmet = [f"{key}={value}" for key, value in missing.items() if key not in open_ones]
        return [f"set before the process starts: {', '.join(unmet)}"] if unmet else []

    def stream(self) -> Any:
        return self.torch.Stream(device=self.device())

    def event(self, timing: bool = False) -> Any:
        return self.torch.Event(self.device(), enable_timing=timing)

    def capture(
        self, work: Callable[[], Result], warm_ups: int = 3, beside: Captured[Any] | None = None
    ) -> Captured[Result]:
        if self.capabilities().graph_capture == "none":
            raise Unsupported(f"device '{self.name}' records no graphs: call the work each time instead")
        graph, recording = self._recording(None if beside is None else beside.pool)
        self._side = self._side or self.stream()
        here, side = self.torch.accelerator.current_stream(), self._side
        side.wait_stream(here)
        with side:  # the stream that a program starts with cannot be recorded
            for _ in range(warm_ups):
                work()
            with recording:
                result = work()
        here.wait_stream(side)
        return Captured(graph.replay, result, graph.pool())

    def _recording(self, pool: Any) -> tuple[Any, AbstractContextManager[Any]]:
        """A new graph in the memory `pool` of another one, None: its own, and the context that records into it.

        While it records, other threads of the process may go on allocating memory (`thread_local`).
        """
        graph_class = getattr(self.torch.accelerator, "Graph", None)
        if graph_class is None:
            raise Unsupported(f"PyTorch {self.torch.__version__} records no graphs on '{self.name}', 2.12 and newer do")
        graph = graph_class(pool=pool, capture_error_mode="thread_local")
        return graph, graph

    @property
    def profiler_module(self) -> Any:
        """A module with the interface of `torch.profiler`."""
        return self.torch.profiler

    def profiler(self, **options: Any) -> AbstractContextManager[Any]:
        module = self.profiler_module
        return module.profile(activities=module.supported_activities(), **options)

    def to_canonical(self, t: Tensor) -> Tensor:
        return t
