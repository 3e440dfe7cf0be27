"""What a device says of itself once it is open: `python -m siirl.device.facts NAME` prints it as JSON.

A process of its own, because opening a device imports PyTorch, takes memory on the device and may fail as a whole.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from siirl.device.backend import Backend
from siirl.device.selection import launch_environment, select

TIMEOUT_S = 120.0


def ask(backend: Backend, timeout_s: float = TIMEOUT_S) -> dict[str, Any]:
    """Open the device in a child; its facts, or {"error": sentence}."""
    environment = {**os.environ, **launch_environment(backend, "driver")}
    command = [sys.executable, "-m", "siirl.device.facts", backend.name]
    try:
        child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return {"error": f"it did not open within {timeout_s:g} s"}
    if child.returncode != 0:
        last = child.stderr.strip().splitlines()[-1:]
        return {"error": last[0] if last else f"opening it ended with status {child.returncode}"}
    return json.loads(child.stdout.splitlines()[-1])


def tell(name: str) -> dict[str, Any]:
    """Open the device in this process and describe it."""
    backend = select(name, role="driver")
    backend.bind(0)
    from siirl_kernels import obstacle
    from siirl_kernels.selftest import bind_tested, failures

    order, spec = backend.kernel_order(), backend.communication()
    return {
        "capabilities": backend.capabilities().to_dict(),
        "kernels": bind_tested(order, device=backend.device()),
        "kernels_failed": {f"{op} by {provider}": why for (op, provider), why in failures().items()},
        "kernels_left_out": {provider: why for provider in order if (why := obstacle(provider)) is not None},
        "communication": {
            "torch_backend": spec.torch_backend,
            "dtypes": {collective: sorted(dtypes) for collective, dtypes in spec.dtypes.items()},
        },
    }


if __name__ == "__main__":
    print(json.dumps(tell(sys.argv[1])))
