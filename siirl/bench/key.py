"""The key of a recorded run: what has to be equal for its numbers to mean the same."""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from siirl.device.backend import Backend

# The commit names a record; comparing two commits is what records are for.
COUNTERS_NEED = ("backend", "torch_release")
TIMES_NEED = ("backend", "torch", "device", "driver", "python")


@dataclass(frozen=True)
class Key:
    """Where and of what code a run was measured."""

    backend: str
    device: str
    driver: str
    torch: str
    python: str
    commit: str

    @classmethod
    def of(cls, backend: Backend, commit: Mapping[str, Any]) -> Key:
        """The key of a run on this back end; ``commit`` as pytest-benchmark describes it."""
        import torch

        versions = {name: version for name, version in backend.probe().versions.items() if name != "torch"}
        return cls(
            backend=backend.name,
            device=backend.capabilities().device_name,
            driver=", ".join(f"{name} {version}" for name, version in sorted(versions.items())) or "none",
            torch=torch.__version__,
            python=".".join(platform.python_version_tuple()[:2]),
            commit=commit["id"][:12] + ("-dirty" if commit.get("dirty") else ""),
        )

    def to_dict(self) -> dict[str, str]:
        return asdict(self)

    @property
    def torch_release(self) -> str:
        """PyTorch's version without the build: builds for different drivers have the same operators."""
        return self.torch.partition("+")[0]

    @property
    def file_name(self) -> str:
        """The record's name: ``cpu_intel-xeon_torch-2.13.0-cpu_1a2b3c4d5e6f.json``."""
        parts = (self.backend, self.device, f"torch-{self.torch}", self.commit)
        return "_".join(re.sub(r"[^a-z0-9.]+", "-", part.lower()).strip("-") for part in parts) + ".json"

    def differences(self, other: Key, parts: tuple[str, ...]) -> list[str]:
        """``torch release is 2.13.0 here and 2.12.0 there`` for each of the parts that is not equal."""
        pairs = [(part.replace("_", " "), getattr(self, part), getattr(other, part)) for part in parts]
        return [f"{part} is {mine} here and {theirs} there" for part, mine, theirs in pairs if mine != theirs]
