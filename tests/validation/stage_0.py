"""Back ends whose first stage is broken. Imports no torch: a check runs it in a process that must not."""

from __future__ import annotations

import os

from siirl.device import Probe, Role
from siirl_cpu import CpuBackend


class ProbeImportsTorch(CpuBackend):
    @classmethod
    def probe(cls) -> Probe:
        import torch

        return Probe(True, torch.get_num_threads(), "threads")


class ProbeChangesTheEnvironment(CpuBackend):
    @classmethod
    def probe(cls) -> Probe:
        os.environ["WAS_HERE"] = "1"
        return super().probe()


class FewerDevicesEachTime(CpuBackend):
    left = 9

    @classmethod
    def probe(cls) -> Probe:
        cls.left -= 1
        return Probe(True, cls.left, "devices")


class EnvironmentGrows(CpuBackend):
    @classmethod
    def bootstrap_env(cls, role: Role) -> dict[str, str]:
        return {"OPTIONS": os.environ.get("OPTIONS", "") + "fast,"}


class NoReference(CpuBackend):
    @classmethod
    def kernel_order(cls) -> list[str]:
        return ["native"]


class NamedInTheFramework(CpuBackend):
    name = "decoder"

    @classmethod
    def is_accelerator(cls) -> bool:
        return True
