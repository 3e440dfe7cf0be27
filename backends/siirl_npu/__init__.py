"""Huawei Ascend NPUs through torch_npu, CANN and HCCL."""

from __future__ import annotations

import glob
import importlib
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from siirl.device import Capabilities, CommSpec, EngineSpec, Probe, Role, TorchBackend, Unsupported, host
from siirl.device.backend import Captured, Determinism, Result
from siirl_npu import preflight

if TYPE_CHECKING:
    from torch import Tensor

NODES = "/dev/davinci[0-9]*"

# What the documentation of torch_npu 2.13 lists as verified, less the reductions its source refuses.
MOVED = {
    "all_reduce": frozenset({"bfloat16", "float16", "float32", "int32", "int64"}),
    "all_to_all": frozenset({"float32"}),
    "broadcast": frozenset(
        {"bfloat16", "float16", "float32", "float64", "uint8", "int8", "int16", "int32", "int64", "bool"}
    ),
}
ND = 2
PRIVATE_FORMATS = frozenset({3, 4, 12, 29, 32, 33, 50, 51, 52, 53, 54})  # NC1HWC0, FRACTAL_Z, FRACTAL_NZ and their kin

SWITCHES = {
    "LCCL_DETERMINISTIC": "1",
    "ATB_MATMUL_SHUFFLE_K_ENABLE": "0",
    "ATB_LLM_LCOC_ENABLE": "0",
    "CLOSE_MATMUL_K_SHIFT": "1",
}
# CANN's words for having no stream left for a graph; a device has about 2000 of them (vLLM-Ascend, acl_graph.py).
NO_STREAMS = ("207008", "stream resource", "stream_resource", "alloc sq cq fail")
# HCCL's strict order of reductions exists on these; elsewhere asking for it is an error of every collective.
STRICT_DEVICES = ("Ascend910B", "Ascend910_93")


class NpuBackend(TorchBackend):
    name = "npu"
    torch_type = "npu"
    torch_plugins = ("torch_npu",)

    @classmethod
    def probe(cls) -> Probe:
        packages = ("torch", "torch-npu", "vllm-ascend", "triton", "triton-ascend")
        found = {name: host.installed(name) for name in packages}
        found |= {"cann": preflight.cann_version(), "driver": preflight.driver_version()}
        versions = {name: version for name, version in found.items() if version}
        nodes = len(glob.glob(NODES))
        visible = os.environ.get(cls.visible_devices_env())
        count = nodes if visible is None else min(nodes, len([index for index in visible.split(",") if index.strip()]))
        findings = [*preflight.package_problems(versions), *preflight.cann_problems(versions)]
        if not nodes:
            fix = "check the driver with npu-smi info; start a container with its devices (--device /dev/davinci0)"
            findings.append(("no Ascend device is present (no /dev/davinci0)", fix))
        elif not count:
            findings.append(("ASCEND_RT_VISIBLE_DEVICES hides every device", "unset ASCEND_RT_VISIBLE_DEVICES"))
        stack = f"torch-npu {versions.get('torch-npu')}, CANN {versions.get('cann', 'of unknown release')}"
        return Probe.of(f"{count} Ascend devices, {stack}", count, versions, findings)

    @classmethod
    def bootstrap_env(cls, role: Role) -> dict[str, str]:
        # Free ports, because training and rollout may hold communicators on the same device.
        wanted = {"HCCL_HOST_SOCKET_PORT_RANGE": "auto", "HCCL_NPU_SOCKET_PORT_RANGE": "auto"}
        if role == "driver":
            return wanted
        alone = role in ("trainer", "validation")
        # Level 2 hides more of the cost of launching, takes memory for it and refuses to record graphs.
        wanted["TASK_QUEUE_ENABLE"] = "1"
        # An engine's sleep mode refuses expandable segments, and both variables together end the process.
        chosen = {"PYTORCH_ALLOC_CONF", "PYTORCH_NPU_ALLOC_CONF"} & os.environ.keys()
        if alone and not chosen:
            wanted["PYTORCH_NPU_ALLOC_CONF"] = "expandable_segments:True"
        if role == "validation":
            wanted["TORCH_NPU_FALLBACK_CPU_DISABLE"] = "1"  # read once, when torch_npu starts
        return wanted

    @classmethod
    def visible_devices_env(cls) -> str:
        return "ASCEND_RT_VISIBLE_DEVICES"

    @classmethod
    def launcher_resources(cls, n: int) -> dict[str, Any]:
        return {"resources": {"NPU": n}}

    @classmethod
    def kernel_order(cls) -> list[str]:
        return ["ascend", "triton", "torch"]

    @classmethod
    def engines(cls) -> list[EngineSpec]:
        # rl_config keeps weights in the layout that weight updates write, and the allocator fit for sleep mode.
        vllm = {"enable_sleep_mode": True, "additional_config": {"rl_config": {"enabled": True}}}
        return [
            EngineSpec("rollout", "native"),
            EngineSpec("rollout", "vllm", vllm),
            EngineSpec("training", "fsdp"),
            EngineSpec("training", "megatron"),
        ]

    def load(self) -> None:
        super().load()
        importlib.import_module("siirl_kernels.ascend")  # which imports the extension, so not before

    @property
    def torch_npu(self) -> Any:
        import torch_npu

        return torch_npu

    def capabilities(self) -> Capabilities:
        facts = self.module.get_device_properties(self.torch.accelerator.current_device_index())
        return Capabilities(
            device_name=facts.name,
            memory_bytes=facts.total_memory,
            compute_units=facts.cube_core_num,
            compute_dtypes=("float32", "bfloat16", "float16"),
            fast_dtypes=("bfloat16", "float16"),
            fast_int64=False,
            interconnect="unknown" if self.module.device_count() > 1 else "none",
            graph_capture="none" if os.environ.get("TASK_QUEUE_ENABLE") == "2" else "inference",
            sleep_levels=(1, 2),
            pin_memory=True,
            private_formats=True,
        )

    def communication(self) -> CommSpec:
        return CommSpec(
            "cpu:gloo,npu:hccl",
            MOVED,
            max_group_name=32,
            interface_env=("GLOO_SOCKET_IFNAME", "HCCL_SOCKET_IFNAME"),
        )

    def deterministic(self, level: Determinism) -> list[str]:
        unmet = super().deterministic(level)
        if level == "off":
            return unmet
        device = self.capabilities().device_name
        strict = level == "strict" and device.startswith(STRICT_DEVICES)
        if level == "strict" and not strict:
            unmet.append(f"{device} adds up a collective in no fixed order (no HCCL_DETERMINISTIC=strict)")
        # Read when a communicator or a library is first used, so they must stand before.
        chosen = os.environ.get("HCCL_DETERMINISTIC")
        wanted = SWITCHES | {"HCCL_DETERMINISTIC": "strict" if strict or chosen == "strict" else "true"}
        return unmet + self._set_switches(wanted, late=self.torch.distributed.is_initialized())

    def capture(
        self, work: Callable[[], Result], warm_ups: int = 3, beside: Captured[Any] | None = None
    ) -> Captured[Result]:
        try:
            return super().capture(work, warm_ups, beside)
        except RuntimeError as error:
            if any(words in str(error).lower() for words in NO_STREAMS):
                raise Unsupported("the NPU has no streams left for another graph") from error
            raise

    def _recording(self, pool: Any) -> tuple[Any, AbstractContextManager[Any]]:
        if not hasattr(self.module, "NPUGraph"):
            raise Unsupported(f"torch-npu {host.installed('torch-npu')} records no graphs: call the work each time")
        graph = self.module.NPUGraph()
        return graph, self.module.graph(graph, pool=pool, capture_error_mode="thread_local")

    @property
    def profiler_module(self) -> Any:
        return self.torch_npu.profiler

    def to_canonical(self, t: Tensor) -> Tensor:
        if t.device.type != self.torch_type:
            return t
        whole = t.to_local() if hasattr(t, "to_local") else t  # a shard is what lies in this device's memory
        if int(self.torch_npu.get_npu_format(whole)) not in PRIVATE_FORMATS:
            return t
        if whole is not t:
            raise Unsupported("a sharded tensor in a private memory format cannot be read; cast it before sharding")
        return self.torch_npu.npu_format_cast(t, ND)
