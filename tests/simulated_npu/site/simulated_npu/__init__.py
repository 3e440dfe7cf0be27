"""What a test asks of the simulated device from inside a process that runs on it: count, limit, take away.

Of the real device's surface nothing is here; that is `torch_npu`.
"""

from __future__ import annotations

import atexit
import json
import os
from pathlib import Path
from typing import Any, NoReturn

import torch  # whose libraries the device is linked with

# isort: split
import simulated_npu_device as device
from torch_npu._ops import fused


def counters(index: int = 0) -> dict[str, Any]:
    """What has happened since the process, or the last `reset_counters`, began; the same in every run of a program.

    operators: calls by name; distinct: how many names; fused: calls of the vendor's own ops; fallbacks: calls of
    operators without a kernel, carried out by the host; copies and collectives: calls and bytes by kind;
    memory of device `index`: live_bytes, peak_bytes, allocations (of the process), ooms.
    """
    counted = device.counted()
    counted["calls"] = sum(counted["operators"].values())
    counted["distinct"] = len(counted["operators"])
    return counted | {"fused": dict(fused), "memory": device.account(index)}


def reset_counters() -> None:
    """Calls, copies and collectives begin at 0 again. Memory statistics are the device module's to reset."""
    device.clear_counters()
    fused.clear()


def set_memory_limit(limit: int, index: int = 0) -> None:
    """Bytes of device `index`; an allocation beyond raises torch.OutOfMemoryError."""
    device.set_memory_limit(index, limit)


def remove_kernel(operator: str) -> None:
    """`operator` ("aten::erfinv") has no kernel from now on: the host carries it out, which is counted as a fallback.

    With TORCH_NPU_FALLBACK_CPU_DISABLE=1 calling it raises NotImplementedError.
    """
    device.remove_kernel(operator)


def _report(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    name = os.environ.get("RANK") or f"process_{os.getpid()}"
    (folder / f"{name}.json").write_text(json.dumps(counters(device.current_device()), indent=1, sort_keys=True))


def _report_at_the_end(folder: Path) -> None:
    """However the process ends: workers leave by `os._exit`, which calls nothing that was registered."""
    leave = os._exit

    def report_and_leave(status: int) -> NoReturn:
        _report(folder)
        leave(status)

    os._exit = report_and_leave
    atexit.register(_report, folder)


if "SIMULATED_NPU_REPORT" in os.environ:
    _report_at_the_end(Path(os.environ["SIMULATED_NPU_REPORT"]))
