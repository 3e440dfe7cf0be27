"""`torch_npu.profiler`: PyTorch's own, which times the simulated device by its events."""

from __future__ import annotations

from torch.profiler import ProfilerAction, profile, schedule, tensorboard_trace_handler
from torch.profiler import ProfilerActivity as _Activity


class ProfilerActivity:
    CPU = _Activity.CPU
    NPU = _Activity.PrivateUse1


def supported_activities() -> set[_Activity]:
    return {ProfilerActivity.CPU, ProfilerActivity.NPU}


__all__ = [
    "ProfilerAction",
    "ProfilerActivity",
    "profile",
    "schedule",
    "supported_activities",
    "tensorboard_trace_handler",
]
