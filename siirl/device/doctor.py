"""What `siirl doctor` tells: versions, devices with reasons, the host, kernels. PyTorch is not imported."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from typing import Any

from siirl.device import host
from siirl.device.selection import automatic, backend_class, probe_all
from siirl.errors import SiirlError

PACKAGES = ("siirl", "torch", "transformers", "tokenizers", "safetensors", "gguf", "numpy", "vllm", "ray")


def collect() -> dict[str, Any]:
    """A JSON-able description of this machine and of what siirl would do on it."""
    probes = probe_all()
    devices = {name: probe.to_dict() | _facts(name) for name, probe in probes.items()}
    try:
        chosen: dict[str, Any] = {"device": automatic(probes)}
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
        "devices": devices,
        "auto": chosen,
        "kernels": {entry.name: entry.value for entry in importlib.metadata.entry_points(group="siirl.kernels")},
    }


def _facts(name: str) -> dict[str, Any]:
    """What a back end says of itself; nothing when its package cannot be imported."""
    try:
        backend = backend_class(name)
    except SiirlError:
        return {}
    engines = [{"kind": engine.kind, "name": engine.name} for engine in backend.engines()]
    return {
        "accelerator": backend.is_accelerator(),
        "kernel_order": backend.kernel_order(),
        "engines": engines,
        "visible_devices_env": backend.visible_devices_env(),
    }
