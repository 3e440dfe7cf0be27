"""A simulated Ascend NPU for tests: a device `npu` on host memory, and a `torch_npu` with the ops that siirl calls.

    environment = simulated_npu.environment()       # builds the device on first use
    subprocess.run([python, "-m", "siirl", "train", recipe, "--device", "npu"], env=os.environ | environment)

What runs is siirl's own back end for NPUs; only its probe is answered for the simulation. Inside such a process
`simulated_npu` (in `site/`) counts what happens: `simulated_npu.counters()`.
"""

from __future__ import annotations

import os
from pathlib import Path

from tests.simulated_npu.build import missing, package_folder

SITE = Path(__file__).with_name("site")

__all__ = ["environment", "missing"]


def environment(
    devices: int = 2, memory_bytes: int | None = None, report: Path | None = None, search: str | None = None
) -> dict[str, str]:
    """Variables under which a subprocess finds the simulated device.

    Args:
        memory_bytes: of each device; one more is out of memory. None: 8 GiB.
        report: a directory that gets every process's counters as it ends, `<rank>.json`.
        search: PYTHONPATH behind the simulation's own; None: this process's.

    Raises:
        RuntimeError: it cannot be built here; `missing()` tells beforehand why.
    """
    behind = os.environ.get("PYTHONPATH", "") if search is None else search
    found = [str(SITE), str(package_folder()), *filter(None, behind.split(os.pathsep))]
    chosen = {"PYTHONPATH": os.pathsep.join(dict.fromkeys(found)), "SIMULATED_NPU_DEVICES": str(devices)}
    if memory_bytes is not None:
        chosen["SIMULATED_NPU_MEMORY_BYTES"] = str(memory_bytes)
    if report is not None:
        chosen["SIMULATED_NPU_REPORT"] = str(report)
    return chosen
