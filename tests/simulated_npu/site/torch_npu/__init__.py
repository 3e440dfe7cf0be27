"""The part of torch_npu that siirl calls, on the simulated device.

Importing it gives PyTorch the device `npu`, the module `torch.npu` and the collective library `hccl`.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import torch  # whose libraries the device is linked with
import torch.distributed as dist

# isort: split
import simulated_npu_device as _device

from torch_npu._ops import (
    npu_fusion_attention,
    npu_rms_norm,
    npu_rotary_mul,
    npu_swiglu,
)

LONGEST_GROUP_NAME = 32  # characters


class _Options:
    """`ProcessGroupHCCL.Options`: what a communicator is made with."""

    def __init__(self) -> None:
        self.hccl_config: dict[str, Any] = {}


_C = SimpleNamespace(_distributed_c10d=SimpleNamespace(ProcessGroupHCCL=SimpleNamespace(Options=_Options)))


def _autoload() -> None:
    """What PyTorch calls as it starts, through the entry point `torch.backends`."""


def _hccl(options: Any, given: _Options | None) -> Any:
    name = given.hccl_config.get("group_name", "") if isinstance(given, _Options) else ""
    if len(name) > LONGEST_GROUP_NAME:
        raise ValueError(f"HCCL: a group's name has at most {LONGEST_GROUP_NAME} characters, '{name}' has {len(name)}")
    host = dist.ProcessGroupGloo(options.store, options.group_rank, options.group_size, options.timeout)
    return _device.hccl(host)


torch.utils.rename_privateuse1_backend("npu")

from torch_npu import npu, profiler  # noqa: E402  # both ask for the device by its name
from torch_npu._formats import Format, get_npu_format, npu_format_cast  # noqa: E402

torch._register_device_module("npu", npu)
sys.modules["torch.npu"] = npu
torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)
dist.Backend.register_backend("hccl", _hccl, extended_api=True, devices=["npu"])
# The device's own autograd thread would need the interpreter while the process ends, and abort it.
torch.autograd.set_multithreading_enabled(False)

import simulated_npu  # noqa: E402  # which may have a report to write at the end
