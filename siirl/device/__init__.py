"""The hardware contract. Importing this package imports no torch; `select` and what it returns do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from siirl.device.backend import (
    Backend,
    Capabilities,
    Captured,
    CommSpec,
    EngineSpec,
    MemoryInfo,
    Probe,
    RngState,
    Role,
    Unsupported,
)
from siirl.device.selection import current, launch_environment, prepare, probe_all, resolve, select
from siirl.device.torch_backend import TorchBackend

if TYPE_CHECKING:
    from siirl.device.collectives import Collectives

__all__ = [
    "Backend",
    "Capabilities",
    "Captured",
    "Collectives",
    "CommSpec",
    "EngineSpec",
    "MemoryInfo",
    "Probe",
    "RngState",
    "Role",
    "TorchBackend",
    "Unsupported",
    "current",
    "launch_environment",
    "prepare",
    "probe_all",
    "resolve",
    "select",
]


def __getattr__(name: str) -> Any:
    if name == "Collectives":
        from siirl.device.collectives import Collectives

        return Collectives
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
