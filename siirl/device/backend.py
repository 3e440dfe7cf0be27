"""The hardware contract: what a back end answers about one kind of device, and does with it.

A back end lives through two stages. Stage 0 (the class methods) is asked before PyTorch is imported, because a
broken vendor extension can make that import fail: is the device usable, why not, what must the environment hold.
Stage 1 (everything else) follows `load()`, which imports PyTorch and the vendor's extension.

A call that a device cannot honour raises `Unsupported`; none answers None in silence. Bytes are bytes, times seconds
and dtypes outside of tensors their PyTorch names without the prefix (`bfloat16`).
"""

from __future__ import annotations

import hashlib
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, TypeVar

from siirl.errors import SiirlError

if TYPE_CHECKING:
    import torch

Result = TypeVar("Result")
Role = Literal["driver", "trainer", "colocated", "rollout", "validation"]
Determinism = Literal["off", "on", "strict"]


class Unsupported(SiirlError):
    """The device, or PyTorch on it, cannot do what was asked."""


@dataclass(frozen=True)
class Probe:
    """Whether a device is usable here, found out without importing PyTorch.

    `count` devices can be used. `present` are there, usable or not. `devices` describes each that the driver knows.
    `notes` are sentences on what may matter and keeps nobody from using the device.
    """

    available: bool
    count: int
    reason: str
    versions: dict[str, str] = field(default_factory=dict)
    problems: tuple[str, ...] = ()
    fixes: tuple[str, ...] = ()
    present: int = 0
    devices: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        found: str,
        count: int,
        versions: dict[str, str],
        findings: Iterable[tuple[str, str]],
        devices: Iterable[str] = (),
        notes: Iterable[str] = (),
    ) -> Probe:
        """A probe from what was `found` and from (problem, fix) pairs; any problem makes the device unavailable."""
        problems, fixes = zip(*pairs, strict=True) if (pairs := list(findings)) else ((), ())
        unique_fixes = tuple(dict.fromkeys(fix for fix in fixes if fix))
        facts: dict[str, Any] = {"present": count, "devices": tuple(devices), "notes": tuple(notes)}
        if problems:
            return cls(False, 0, "; ".join(problems), versions, problems, unique_fixes, **facts)
        return cls(True, count, found, versions, **facts)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class MemoryInfo:
    """Bytes. `unified`: the device computes in the host's memory, so its figures are those of the process."""

    free: int
    total: int
    allocated: int
    reserved: int
    peak: int
    host_peak: int
    unified: bool


@dataclass(frozen=True)
class Capabilities:
    """Facts of one device. What is not known is empty or None, never guessed."""

    device_name: str
    memory_bytes: int
    compute_units: int
    compute_dtypes: tuple[str, ...]  # results are right
    fast_dtypes: tuple[str, ...]  # the hardware multiplies them at full rate
    fast_int64: bool = True
    peak_flops: Mapping[str, float] = field(default_factory=dict)  # dense, per second, by dtype
    memory_bandwidth: float | None = None  # bytes per second
    interconnect: str = "none"
    graph_capture: Literal["none", "inference", "training"] = "none"
    sleep_levels: tuple[int, ...] = ()  # what a rollout engine can free and take back
    pin_memory: bool = False
    private_formats: bool = False  # tensors may have a memory layout that `to_canonical` undoes

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


# dtypes of gloo, which moves every tensor that lies in host memory.
HOST_DTYPES = frozenset({"bool", "uint8", "int8", "int32", "int64", "float16", "bfloat16", "float32", "float64"})


@dataclass(frozen=True)
class CommSpec:
    """How `torch.distributed` reaches this device, and what it lacks there.

    `dtypes` maps a collective (`all_reduce`, `all_to_all`, `broadcast`) to the dtypes it moves between devices.
    `interface_env` are the variables that name the network interface to bind to. `options` makes the `pg_options`
    of a process group from its time limit, once PyTorch is loaded; without it the library has its defaults.
    """

    torch_backend: str
    dtypes: Mapping[str, frozenset[str]]
    max_group_name: int | None = None
    interface_env: tuple[str, ...] = ("GLOO_SOCKET_IFNAME",)
    options: Callable[[timedelta], Any] | None = None

    def supports(self, collective: str, dtype: str) -> bool:
        return dtype in self.dtypes.get(collective, frozenset())

    def group_name(self, name: str) -> str:
        """`name`, or where the library takes only shorter names its beginning and a digest of the whole."""
        if self.max_group_name is None or len(name) <= self.max_group_name:
            return name
        digest = hashlib.sha256(name.encode()).hexdigest()[:12]
        return f"{name[: self.max_group_name - 13]}-{digest}"


@dataclass(frozen=True)
class EngineSpec:
    """A rollout or training engine that runs on the device, and the options it needs there."""

    kind: Literal["rollout", "training"]
    name: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RngState:
    """States of PyTorch's generators, tagged: one device's bytes mean nothing to another."""

    backend: str
    states: Mapping[str, bytes]

    def to_json(self) -> dict[str, Any]:
        return {"backend": self.backend, "states": {name: state.hex() for name, state in self.states.items()}}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> RngState:
        return cls(data["backend"], {name: bytes.fromhex(state) for name, state in data["states"].items()})


@dataclass(frozen=True)
class Captured(Generic[Result]):
    """Recorded work. `replay()` does it again on the current stream, from what its inputs' memory holds by then.

    `result` is what the recorded call returned; each replay writes into the same tensors. `pool` names the memory that
    the recording computes in, where the device can share it between recordings.
    """

    replay: Callable[[], None]
    result: Result
    pool: Any = None


class Backend(ABC):
    """One kind of device. `siirl.device.TorchBackend` implements stage 1 for whatever PyTorch already abstracts."""

    name: ClassVar[str]
    torch_type: ClassVar[str]  # may differ from the name: some vendors answer to another's device type
    torch_plugins: ClassVar[tuple[str, ...]] = ()  # packages that extend PyTorch for it and load with it
    replaces: ClassVar[str | None] = None  # the back end of this name for which it stands in, from another package

    # Stage 0: PyTorch is not imported.

    @classmethod
    def is_accelerator(cls) -> bool:
        """Whether `auto` prefers it to the host."""
        return cls.torch_type != "cpu"

    @classmethod
    @abstractmethod
    def probe(cls) -> Probe:
        """Look for the device, its driver and its packages, and say in words what is missing and what helps."""

    @classmethod
    def bootstrap_env(cls, role: Role) -> dict[str, str]:
        """Variables to set before a process of this role starts PyTorch, where the user set none.

        trainer: all device memory is PyTorch's; colocated: it shares the process with an engine that takes and
        frees memory pools; rollout: such an engine alone; driver: computes nothing; validation: as a trainer, and what
        hides that the device lacks an operator is switched off.
        """
        return {}

    @classmethod
    @abstractmethod
    def visible_devices_env(cls) -> str:
        """The variable that lists the devices a process may see; empty where there is none."""

    @classmethod
    @abstractmethod
    def launcher_resources(cls, n: int) -> dict[str, Any]:
        """Ray's resource arguments for an actor that owns `n` devices."""

    @classmethod
    @abstractmethod
    def kernel_order(cls) -> list[str]:
        """Kernel providers, the one to try first at the head, the PyTorch reference last."""

    @classmethod
    @abstractmethod
    def engines(cls) -> list[EngineSpec]:
        """Engines that run here, preferred ones first."""

    @classmethod
    def expected_failures(cls) -> Path | None:
        """The checks of `siirl validate` that this device is known to fail; `expected_failures.toml` beside its module.

        A file is read by siirl.validation.expected; None where there is none.
        """
        module = sys.modules[cls.__module__].__file__
        beside = Path(module).with_name("expected_failures.toml") if module else None
        return beside if beside and beside.is_file() else None

    # Stage 1: from here on `load()` has been called.

    @abstractmethod
    def load(self) -> None:
        """Import PyTorch and the vendor's extension. Raises DeviceError when the device cannot be opened."""

    @abstractmethod
    def bind(self, local_rank: int, threads: int | None = None) -> None:
        """Give this process device `local_rank` of those it sees, and `threads` CPU threads for host operators.

        A launcher that shows each worker its own device alone binds it to 0. Raises DeviceError.
        """

    @abstractmethod
    def device(self) -> torch.device:
        """The device this process is bound to."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until the device has done everything that was asked of it."""

    @abstractmethod
    def capabilities(self) -> Capabilities: ...

    @abstractmethod
    def communication(self) -> CommSpec: ...

    @abstractmethod
    def seed(self, n: int) -> None:
        """Seed PyTorch's generators, the host's and the device's."""

    @abstractmethod
    def rng_state(self) -> RngState: ...

    @abstractmethod
    def set_rng_state(self, state: RngState) -> None:
        """Raises RequestError for the state of another back end."""

    @abstractmethod
    def memory(self) -> MemoryInfo: ...

    @abstractmethod
    def reset_peak_memory(self) -> bool:
        """Start `memory().peak` anew; False where the system keeps only the peak since the process began."""

    @abstractmethod
    def empty_cache(self) -> None: ...

    @abstractmethod
    def autocast(self, dtype: torch.dtype) -> AbstractContextManager[Any]:
        """Mixed precision in `dtype`; float32 means none. Raises Unsupported."""

    @abstractmethod
    def deterministic(self, level: Determinism) -> list[str]:
        """Make runs repeatable: `on` warns at an operator that cannot be, `strict` raises. Returns what stays unmet."""

    @abstractmethod
    def stream(self) -> Any:
        """A new stream: a context manager with synchronize, wait_stream, wait_event and record_event."""

    @abstractmethod
    def event(self, timing: bool = False) -> Any:
        """A new event with record, synchronize, query and elapsed_time (milliseconds, only with `timing`)."""

    @abstractmethod
    def capture(
        self, work: Callable[[], Result], warm_ups: int = 3, beside: Captured[Any] | None = None
    ) -> Captured[Result]:
        """Record `work` as a graph of the device, after running it `warm_ups` times for what it allocates and tunes.

        `work` reads its inputs from tensors that outlive it, has no control flow that depends on values on the device,
        and copies nothing to the host. Recordings made `beside` another compute in the same memory: they are replayed
        one after the other, and what one returned is read before another is replayed. Raises Unsupported where the
        device, or PyTorch on it, records none, or no more.
        """

    @abstractmethod
    def profiler(self, **options: Any) -> AbstractContextManager[Any]:
        """A profiler of host and device with the options of `torch.profiler.profile`."""

    @abstractmethod
    def to_canonical(self, t: torch.Tensor) -> torch.Tensor:
        """The tensor in PyTorch's own memory layout, itself where it has that already.

        Whatever leaves the device as bytes goes through it first: collectives, checkpoints, exports, weights on their
        way to a rollout engine.
        """
