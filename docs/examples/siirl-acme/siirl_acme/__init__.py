"""A back end of one's own: Acme accelerators, which PyTorch knows by the device type `acme` through `torch_acme`."""

from __future__ import annotations

import glob
import importlib
from typing import Any

from siirl.device import Capabilities, CommSpec, EngineSpec, Probe, TorchBackend, host
from siirl_cpu import CpuBackend

MOVED = frozenset({"uint8", "int32", "int64", "bfloat16", "float32"})


class AcmeBackend(TorchBackend):
    name = "acme"
    torch_type = "acme"
    torch_plugins = ("torch_acme",)

    @classmethod
    def probe(cls) -> Probe:
        versions = {name: found for name in ("torch", "torch-acme") if (found := host.installed(name))}
        count = len(glob.glob("/dev/acme[0-9]*"))
        findings = []
        if "torch-acme" not in versions:
            findings.append(("the package torch-acme is not installed", "pip install torch-acme"))
        if not count:
            findings.append(("no Acme device is present (no /dev/acme0)", "check the driver with acme-info"))
        return Probe.of(f"{count} Acme devices", count, versions, findings)

    @classmethod
    def visible_devices_env(cls) -> str:
        return "ACME_VISIBLE_DEVICES"

    @classmethod
    def launcher_resources(cls, n: int) -> dict[str, Any]:
        return {"resources": {"ACME": n}}

    @classmethod
    def kernel_order(cls) -> list[str]:
        return ["acme", "torch"]

    @classmethod
    def engines(cls) -> list[EngineSpec]:
        return [EngineSpec("rollout", "native"), EngineSpec("training", "fsdp")]

    def load(self) -> None:
        super().load()
        importlib.import_module("siirl_acme.kernels")

    def capabilities(self) -> Capabilities:
        facts = self.module.get_device_properties(self.device())
        return Capabilities(
            device_name=facts.name,
            memory_bytes=facts.total_memory,
            compute_units=facts.core_count,
            compute_dtypes=("float32", "bfloat16"),
            fast_dtypes=("bfloat16",),
        )

    def communication(self) -> CommSpec:
        moved = dict.fromkeys(("all_reduce", "all_to_all", "broadcast"), MOVED)
        return CommSpec("cpu:gloo,acme:accl", moved, interface_env=("GLOO_SOCKET_IFNAME", "ACCL_SOCKET_IFNAME"))


class AcmeHostBackend(CpuBackend):
    """The host with Acme's kernels, for a machine without the device."""

    name = "acme-host"

    @classmethod
    def kernel_order(cls) -> list[str]:
        return ["acme", *super().kernel_order()]

    def load(self) -> None:
        super().load()
        importlib.import_module("siirl_acme.kernels")
