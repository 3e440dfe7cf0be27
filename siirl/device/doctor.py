"""What `siirl doctor` tells: versions, devices with reasons, the host, kernels.

PyTorch is imported only in the child that opens a usable device.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from typing import Any

from siirl.device import facts, host
from siirl.device.backend import Probe
from siirl.device.selection import VARIABLE, automatic, backend_class, probe_all
from siirl.errors import SiirlError

PACKAGES = ("siirl", "torch", "transformers", "tokenizers", "safetensors", "gguf", "numpy", "vllm", "ray")


def collect(open_devices: bool = True) -> dict[str, Any]:
    """A JSON-able description of this machine and of what siirl would do on it.

    `open_devices`: also open each usable device, in a process of its own, for its capabilities and kernels.
    """
    probes = probe_all()
    try:
        choice = automatic(probes)
        chosen: dict[str, Any] = {"device": choice.device, "reason": choice.reason}
    except SiirlError as error:
        chosen = {"device": None, "reason": str(error)}
    return {
        "python": {"version": platform.python_version(), "executable": sys.executable},
        "platform": platform.platform(),
        "packages": {name: host.installed(name) for name in PACKAGES},
        "torch_build": host.torch_build(),
        "host": {
            "cpu": host.cpu_name(),
            "cores": host.usable_cores(),
            "memory_bytes": host.memory_total(),
            "memory_available_bytes": host.memory_available(),
        },
        "devices": {name: probe.to_dict() | _facts(name, probe, open_devices) for name, probe in probes.items()},
        "auto": chosen,
        "environment": {VARIABLE: os.environ[VARIABLE]} if os.environ.get(VARIABLE) else {},
        "kernels": {entry.name: entry.value for entry in importlib.metadata.entry_points(group="siirl.kernels")},
    }


def _facts(name: str, probe: Probe, open_devices: bool) -> dict[str, Any]:
    """What a back end says of itself; nothing when its package cannot be imported."""
    try:
        backend = backend_class(name)
    except SiirlError:
        return {}
    engines = [{"kind": engine.kind, "name": engine.name} for engine in backend.engines()]
    return {
        "back_end": f"{backend.__module__}:{backend.__qualname__}",
        "accelerator": backend.is_accelerator(),
        "kernel_order": backend.kernel_order(),
        "engines": engines,
        "visible_devices_env": backend.visible_devices_env(),
        **({"opened": facts.ask(backend())} if open_devices and probe.available else {}),
    }
