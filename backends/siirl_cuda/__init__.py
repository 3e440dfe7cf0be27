"""NVIDIA GPUs through PyTorch's CUDA build, NCCL and the caching allocator."""

from __future__ import annotations

import importlib
import os
import re
from datetime import timedelta
from typing import Any

from siirl.device import Capabilities, CommSpec, EngineSpec, Probe, Role, TorchBackend, host
from siirl.device.backend import Determinism
from siirl_cuda import driver as nvidia

INSTALL = "install a PyTorch built for CUDA (https://pytorch.org/get-started/locally)"
MOVED = frozenset({"bool", "uint8", "int8", "int32", "int64", "float16", "bfloat16", "float32", "float64"})

# Words of a device's name; dense bfloat16 FLOP/s and memory bytes/s of NVIDIA's data sheets. The first match counts.
PUBLISHED: tuple[tuple[set[str], float, float], ...] = (
    ({"B200"}, 2.25e15, 8.0e12),
    ({"H200", "NVL"}, 835.5e12, 4.8e12),
    ({"H200"}, 989.5e12, 4.8e12),
    ({"H100", "NVL"}, 835.5e12, 3.9e12),
    ({"H100", "PCIe"}, 756.5e12, 2.0e12),
    ({"H100", "80GB", "HBM3"}, 989.5e12, 3.35e12),
    ({"A100", "80GB", "PCIe"}, 312e12, 1.935e12),
    ({"A100", "80GB"}, 312e12, 2.039e12),
    ({"A100", "40GB"}, 312e12, 1.555e12),
    ({"L40S"}, 362e12, 864e9),
    ({"L4"}, 121e12, 300e9),
)


def published(device_name: str) -> tuple[float | None, float | None]:
    """Dense bfloat16 FLOP/s and memory bytes/s of a device; None for one that is not listed, or only a part."""
    words = set(re.split(r"[ -]", device_name))
    if "MIG" in words:
        return None, None
    return next(((flops, bandwidth) for named, flops, bandwidth in PUBLISHED if named <= words), (None, None))


class CudaBackend(TorchBackend):
    name = "cuda"
    torch_type = "cuda"

    @classmethod
    def probe(cls) -> Probe:
        build = host.torch_build()
        torch, built_for = build.get("__version__"), build.get("cuda")
        driver = nvidia.ask()
        findings = []
        if not torch:
            findings.append(("PyTorch is not installed", INSTALL))
        elif not built_for:
            findings.append((f"PyTorch {torch} is built without CUDA", INSTALL))
        elif "cuda" in driver and _major(built_for) > _major(driver["cuda"]):
            outdated = f"PyTorch is built for CUDA {built_for}, the driver supports {driver['cuda']}"
            findings.append((outdated, "update the NVIDIA driver, or install a PyTorch built for an earlier CUDA"))
        if "error" in driver:
            findings.append((driver["error"], driver.get("fix", "check the driver with nvidia-smi")))
        elif not driver["count"]:
            findings.append(("the NVIDIA driver shows no device to this process", "check CUDA_VISIBLE_DEVICES"))
        release, devices = nvidia.describe()
        known = {"torch": torch, "cuda": built_for, "driver": release, "driver's cuda": driver.get("cuda")}
        versions = {name: version for name, version in known.items() if version}
        found = f"{driver.get('count')} NVIDIA devices, driver for CUDA {driver.get('cuda')}"
        return Probe.of(found, driver.get("count", nvidia.nodes()), versions, findings, devices)

    @classmethod
    def bootstrap_env(cls, role: Role) -> dict[str, str]:
        # Expandable segments end the fragmentation of varying batch shapes, but no engine can put them to sleep.
        chosen = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys()
        return {"PYTORCH_ALLOC_CONF": "expandable_segments:True"} if role == "trainer" and not chosen else {}

    @classmethod
    def visible_devices_env(cls) -> str:
        return "CUDA_VISIBLE_DEVICES"

    @classmethod
    def launcher_resources(cls, n: int) -> dict[str, Any]:
        return {"num_gpus": n}

    @classmethod
    def kernel_order(cls) -> list[str]:
        # Packages that may be installed: flash-attn knows these GPUs best, and takes plain sequences in half precision
        # alone. Liger is behind siirl's own kernels, which need no copies to leave their arguments alone.
        return ["native", "flash_attn", "triton", "liger", "torch"]

    def load(self) -> None:
        super().load()
        for provider in ("triton", "flash_attn", "liger"):
            importlib.import_module(f"siirl_kernels.{provider}")

    @classmethod
    def engines(cls) -> list[EngineSpec]:
        return [
            EngineSpec("rollout", "native"),
            EngineSpec("rollout", "vllm", {"enable_sleep_mode": True}),
            EngineSpec("training", "fsdp"),
            EngineSpec("training", "megatron"),
        ]

    def capabilities(self) -> Capabilities:
        facts = self.module.get_device_properties(self.device())
        generation = (facts.major, facts.minor)
        fast = ["float16"]
        fast += ["bfloat16"] if generation >= (8, 0) else []
        fast += ["float8_e4m3fn", "float8_e5m2"] if generation >= (8, 9) else []
        flops, bandwidth = published(facts.name)
        return Capabilities(
            device_name=facts.name,
            memory_bytes=facts.total_memory,
            compute_units=facts.multi_processor_count,
            compute_dtypes=("float64", "float32", "bfloat16", "float16"),
            fast_dtypes=tuple(fast),
            peak_flops={"bfloat16": flops} if flops else {},
            memory_bandwidth=bandwidth,
            interconnect=self._interconnect(),
            graph_capture="training",
            sleep_levels=(1, 2),
            pin_memory=True,
        )

    def _interconnect(self) -> str:
        count, here = self.module.device_count(), self.module.current_device()
        others = [index for index in range(count) if index != here]
        if not others:
            return "none"
        direct = all(self.module.can_device_access_peer(here, index) for index in others)
        return "peer to peer" if direct else "through the host"

    def communication(self) -> CommSpec:
        return CommSpec(
            "cpu:gloo,cuda:nccl",
            dict.fromkeys(("all_reduce", "all_to_all", "broadcast"), MOVED),
            interface_env=("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"),
            options=self._communicator_options,
        )

    def _communicator_options(self, timeout: timedelta) -> Any:
        """Kernels of a collective go before those of the computation that it overlaps with."""
        options = self.torch.distributed.ProcessGroupNCCL.Options(is_high_priority_stream=True)
        options._timeout = timeout  # PyTorch warns where it is not that of the group
        return options

    def deterministic(self, level: Determinism) -> list[str]:
        unmet = super().deterministic(level)
        self.torch.backends.cudnn.deterministic = level != "off"
        self.torch.backends.cudnn.benchmark = False
        if level == "off":
            return unmet
        if os.environ.get("CUBLAS_WORKSPACE_CONFIG") != ":16:8":  # the other repeatable setting, smaller and slower
            # cuBLAS reads it when it is first used; before any allocation on the device it was not.
            used = self.module.max_memory_allocated() > 0
            unmet += self._set_switches({"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}, late=used)
        if "NCCL_ALGO" not in os.environ:
            # A switch that adds does so in the order of arrival; rings and trees have an order of their own.
            meeting = self.torch.distributed.is_initialized()
            unmet += self._set_switches({"NCCL_ALGO": "^NVLS,NVLSTree"}, late=meeting)
        return unmet

    def _recording(self, pool: Any) -> tuple[Any, Any]:
        """By `torch.cuda.graph` (PyTorch 2.13), which records on one stream of its own, as sharing a pool asks for."""
        graph = self.module.CUDAGraph()
        return graph, self.module.graph(graph, pool=pool, capture_error_mode="thread_local")


def _major(version: str) -> int:
    return int(version.partition(".")[0])
