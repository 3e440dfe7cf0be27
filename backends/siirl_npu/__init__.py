"""Huawei Ascend NPUs through torch_npu, CANN and HCCL."""

from __future__ import annotations

import glob
import os
from typing import TYPE_CHECKING, Any

from siirl.device import Capabilities, CommSpec, EngineSpec, Probe, Role, TorchBackend, host
from siirl.device.backend import Determinism

if TYPE_CHECKING:
    from torch import Tensor

LIBRARIES = ("libascendcl.so", "libhccl.so", "libge_runner.so")
NODES = "/dev/davinci[0-9]*"
# CANN's libraries are opened in a child: loading them early freezes ASCEND_RT_VISIBLE_DEVICES.
ASK_LIBRARIES = f"""
import ctypes, json
def loads(name):
    try:
        return bool(ctypes.CDLL(name))
    except OSError:
        return False
print(json.dumps({{"missing": [name for name in {LIBRARIES!r} if not loads(name)]}}))
"""
SET_ENV = "source CANN's set_env.sh (for example /usr/local/Ascend/ascend-toolkit/set_env.sh)"

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


class NpuBackend(TorchBackend):
    name = "npu"
    torch_type = "npu"
    torch_plugins = ("torch_npu",)

    @classmethod
    def probe(cls) -> Probe:
        packages = ("torch", "torch-npu", "vllm-ascend", "triton", "triton-ascend")
        versions = {name: version for name in packages if (version := host.installed(name))}
        nodes = len(glob.glob(NODES))
        visible = os.environ.get(cls.visible_devices_env())
        count = nodes if visible is None else min(nodes, len([index for index in visible.split(",") if index.strip()]))
        findings = [*cls._package_problems(versions), *cls._library_problems("torch-npu" in versions)]
        if not nodes:
            fix = "check the driver with npu-smi info; start a container with its devices (--device /dev/davinci0)"
            findings.append(("no Ascend device is present (no /dev/davinci0)", fix))
        elif not count:
            findings.append(("ASCEND_RT_VISIBLE_DEVICES hides every device", "unset ASCEND_RT_VISIBLE_DEVICES"))
        return Probe.of(f"{count} Ascend devices, torch-npu {versions.get('torch-npu')}", count, versions, findings)

    @classmethod
    def _package_problems(cls, versions: dict[str, str]) -> list[tuple[str, str]]:
        torch, plugin = versions.get("torch", ""), versions.get("torch-npu", "")
        release = torch.partition("+")[0]
        matching = f"pip install torch-npu=={release}.*" if release else "pip install torch torch-npu"
        findings = []
        if not plugin:
            findings.append(("the package torch-npu is not installed", matching))
        elif release.split(".")[:3] != plugin.split(".")[:3]:
            findings.append((f"torch-npu {plugin} does not fit PyTorch {torch or '(not installed)'}", matching))
        if cuda := host.torch_build().get("cuda"):
            refused = f"PyTorch is built for CUDA {cuda}, and torch-npu refuses it"
            findings.append((refused, "install the CPU build of PyTorch"))
        if {"triton", "triton-ascend"} <= versions.keys():
            clash = "triton and triton-ascend are both installed and overwrite each other"
            findings.append((clash, "pip uninstall triton triton-ascend, then pip install triton-ascend"))
        return findings

    @classmethod
    def _library_problems(cls, has_plugin: bool) -> list[tuple[str, str]]:
        if not has_plugin:
            return []
        answer = host.ask_child(ASK_LIBRARIES)
        if "error" in answer:
            return [(answer["error"], "check CANN and the driver with npu-smi info")]
        if not answer["missing"]:
            return []
        unset = "" if "ASCEND_HOME_PATH" in os.environ else ", ASCEND_HOME_PATH is not set"
        missing = ", ".join(answer["missing"])
        return [
            (f"torch-npu is installed, but CANN's {missing} cannot be loaded{unset}", f"install CANN and {SET_ENV}")
        ]

    @classmethod
    def bootstrap_env(cls, role: Role) -> dict[str, str]:
        # Free ports, because training and rollout may hold communicators on the same device.
        wanted = {"HCCL_HOST_SOCKET_PORT_RANGE": "auto", "HCCL_NPU_SOCKET_PORT_RANGE": "auto"}
        # An engine's sleep mode refuses expandable segments, and both variables together end the process.
        chosen = {"PYTORCH_ALLOC_CONF", "PYTORCH_NPU_ALLOC_CONF"} & os.environ.keys()
        if role == "trainer" and not chosen:
            wanted["PYTORCH_NPU_ALLOC_CONF"] = "expandable_segments:True"
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
            graph_capture="inference",
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
        # Read when a communicator or a library is first used, so they must stand before.
        wanted = SWITCHES | {"HCCL_DETERMINISTIC": "strict" if level == "strict" else "true"}
        missing = {key: value for key, value in wanted.items() if os.environ.get(key) != value}
        if self.torch.distributed.is_initialized():
            late = ", ".join(f"{key}={value}" for key, value in missing.items())
            return [*unmet, *([f"communicators exist already; set before the start: {late}"] if missing else [])]
        os.environ.update(missing)
        return unmet

    @property
    def profiler_module(self) -> Any:
        return self.torch_npu.profiler

    def to_canonical(self, t: Tensor) -> Tensor:
        if t.device.type != self.torch_type or int(self.torch_npu.get_npu_format(t)) not in PRIVATE_FORMATS:
            return t
        return self.torch_npu.npu_format_cast(t, ND)
