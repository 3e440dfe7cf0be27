"""MetaX accelerators: PyTorch knows them as CUDA devices; driver, tools and variables have names of their own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from siirl.device import Capabilities, CommSpec, EngineSpec, Probe, Role, TorchBackend, host
from siirl_cpu import CpuBackend

NODE = Path("/dev/mxcd")
MOVED = frozenset({"uint8", "int8", "int32", "int64", "float16", "bfloat16", "float32", "float64"})
ASK_RUNTIME = """
import ctypes, json
count = ctypes.c_int()
try:
    code = ctypes.CDLL({library!r}).mcGetDeviceCount(ctypes.byref(count))
    answer = {{"count": count.value, **({{"error": f"MACA finds no device (error {{code}})"}} if code else {{}})}}
except OSError as error:
    answer = {{"error": f"MACA's runtime cannot be loaded ({{error}})"}}
print(json.dumps(answer))
"""


class MetaxBackend(TorchBackend):
    name = "metax"
    torch_type = "cuda"  # MetaX's build of PyTorch answers to this device type

    @classmethod
    def probe(cls) -> Probe:
        torch = host.installed("torch") or ""
        findings = []
        if "+metax" not in torch:
            problem = f"PyTorch {torch} is not MetaX's build" if torch else "PyTorch is not installed"
            findings.append((problem, "install MetaX's build of PyTorch, whose version ends in +metax"))
        answer = cls._ask_runtime()
        if "error" in answer:
            findings.append((answer["error"], answer.get("fix", "check the driver with mx-smi")))
        count = answer.get("count", 0)
        return Probe.of(f"{count} MetaX devices", count, {"torch": torch} if torch else {}, findings)

    @classmethod
    def _ask_runtime(cls) -> dict[str, Any]:
        if not NODE.exists():
            fix = (
                f"check the driver with mx-smi; start a container with its devices (--device {NODE} --device /dev/dri)"
            )
            return {"error": f"no MetaX device is present (no {NODE})", "fix": fix}
        library = Path(os.environ.get("MACA_PATH", "/opt/maca")) / "lib" / "libmcruntime.so"
        return host.ask_child(ASK_RUNTIME.format(library=str(library)))

    @classmethod
    def bootstrap_env(cls, role: Role) -> dict[str, str]:
        alone = role in ("trainer", "validation") and "PYTORCH_ALLOC_CONF" not in os.environ
        return {"PYTORCH_ALLOC_CONF": "expandable_segments:True"} if alone else {}

    @classmethod
    def visible_devices_env(cls) -> str:
        return "MACA_VISIBLE_DEVICES"

    @classmethod
    def launcher_resources(cls, n: int) -> dict[str, Any]:
        return {"num_gpus": n}  # to Ray it is a CUDA device as well

    @classmethod
    def kernel_order(cls) -> list[str]:
        return ["metax", "torch"]

    @classmethod
    def engines(cls) -> list[EngineSpec]:
        return [EngineSpec("rollout", "native"), EngineSpec("training", "fsdp")]

    def capabilities(self) -> Capabilities:
        facts = self.module.get_device_properties(self.device())
        return Capabilities(
            device_name=facts.name,
            memory_bytes=facts.total_memory,
            compute_units=facts.multi_processor_count,
            compute_dtypes=("float64", "float32", "bfloat16", "float16"),
            fast_dtypes=("bfloat16", "float16"),
            interconnect="unknown" if self.module.device_count() > 1 else "none",
            pin_memory=True,
        )

    def communication(self) -> CommSpec:
        moved = dict.fromkeys(("all_reduce", "all_to_all", "broadcast"), MOVED)
        return CommSpec("cpu:gloo,cuda:nccl", moved, interface_env=("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"))


class MetaxHostBackend(CpuBackend):
    """The host in the device's place: engines and kernels of the device, tried on a machine without one."""

    name = "metax-host"

    @classmethod
    def kernel_order(cls) -> list[str]:
        return MetaxBackend.kernel_order()

    @classmethod
    def engines(cls) -> list[EngineSpec]:
        return MetaxBackend.engines()
