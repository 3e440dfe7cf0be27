"""siirl's back end for NPUs, with the one question answered that needs a machine with one: are there any?"""

from __future__ import annotations

import os
from typing import ClassVar

from siirl.device import Probe, host
from siirl_npu import NpuBackend


class SimulatedNpuBackend(NpuBackend):
    replaces: ClassVar[str | None] = "npu"

    @classmethod
    def probe(cls) -> Probe:
        count = int(os.environ.get("SIMULATED_NPU_DEVICES", "2"))
        visible = os.environ.get(cls.visible_devices_env())
        if visible is not None:
            count = min(count, len([index for index in visible.split(",") if index.strip()]))
        hidden = ("ASCEND_RT_VISIBLE_DEVICES hides every device", "unset ASCEND_RT_VISIBLE_DEVICES")
        versions = {name: version for name in ("torch", "torch-npu") if (version := host.installed(name))}
        return Probe.of(f"{count} simulated Ascend devices", count, versions, [] if count else [hidden])
