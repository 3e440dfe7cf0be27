"""What NVIDIA's libraries say before PyTorch is imported: cuInit's verdict, and NVML's facts about each device.

Both are asked in a child: cuInit forbids a later fork and freezes CUDA_VISIBLE_DEVICES.
"""

from __future__ import annotations

import glob
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

from siirl.device import host

NODES = ("/dev/nvidia[0-9]*", "/dev/dxg", "/dev/nvhost-gpu", "/dev/nvgpu")  # Linux, WSL, Jetson

ASK_DRIVER = """
import ctypes, json
try:
    driver = ctypes.CDLL("libcuda.so.1")
except OSError as error:
    print(json.dumps({"error": f"the NVIDIA driver's libcuda.so.1 cannot be loaded ({error})"}))
    raise SystemExit
version, count, words = ctypes.c_int(), ctypes.c_int(), ctypes.c_char_p()
code = driver.cuInit(0)
code = code or driver.cuDriverGetVersion(ctypes.byref(version))
code = code or driver.cuDeviceGetCount(ctypes.byref(count))
if code:
    driver.cuGetErrorString(code, ctypes.byref(words))
    print(json.dumps({"error": f"the NVIDIA driver says: {(words.value or b'').decode()} (error {code})"}))
else:
    print(json.dumps({"count": count.value, "cuda": f"{version.value // 1000}.{version.value % 1000 // 10}"}))
"""

# NVML sees every device of the machine, whatever CUDA_VISIBLE_DEVICES says. A link that is not there is an error code.
ASK_NVML = """
import ctypes, json
class Memory(ctypes.Structure):
    _fields_ = [(name, ctypes.c_ulonglong) for name in ("total", "free", "used")]
try:
    nvml = ctypes.CDLL("libnvidia-ml.so.1")
except OSError as error:
    print(json.dumps({"error": str(error)}))
    raise SystemExit
def text(call, *arguments):
    words = ctypes.create_string_buffer(96)
    return words.value.decode() if call(*arguments, words, 96) == 0 else ""
def device(index):
    handle, memory, active = ctypes.c_void_p(), Memory(), ctypes.c_uint()
    nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle))
    nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory))
    links = [nvml.nvmlDeviceGetNvLinkState(handle, link, ctypes.byref(active)) == 0 and active.value
             for link in range(18)]
    return {"name": text(nvml.nvmlDeviceGetName, handle), "uuid": text(nvml.nvmlDeviceGetUUID, handle),
            "memory_bytes": memory.total, "links": sum(map(bool, links))}
count = ctypes.c_uint()
code = nvml.nvmlInit_v2() or nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
if code:
    print(json.dumps({"error": f"NVML error {code}"}))
else:
    print(json.dumps({"driver": text(nvml.nvmlSystemGetDriverVersion), "devices": [*map(device, range(count.value))]}))
"""
SMI = ["nvidia-smi", "--query-gpu=driver_version,name,uuid,memory.total", "--format=csv,noheader,nounits"]


def nodes() -> int:
    """How many device nodes there are."""
    return sum(len(glob.glob(pattern)) for pattern in NODES)


def ask() -> dict[str, Any]:
    """The number of visible devices and the CUDA version the driver supports, or what is wrong."""
    if nodes():
        return host.ask_child(ASK_DRIVER)
    return {
        "error": "no NVIDIA device is present (no /dev/nvidia0)",
        "fix": "check the driver with nvidia-smi; start a container with its GPUs (docker run --gpus all)",
    }


def describe() -> tuple[str | None, list[str]]:
    """The driver's release and a line for each device of the machine: from NVML, else nvidia-smi, else nothing."""
    if not nodes():
        return None, []
    facts = host.ask_child(ASK_NVML)
    if "error" in facts:
        facts = _ask_smi()
    return facts.get("driver"), list(_lines(facts.get("devices", [])))


def _ask_smi() -> dict[str, Any]:
    if shutil.which(SMI[0]) is None:
        return {}
    answer = subprocess.run(SMI, capture_output=True, text=True, timeout=60)
    rows = [[cell.strip() for cell in line.split(",")] for line in answer.stdout.splitlines()]
    if answer.returncode != 0 or not rows:
        return {}
    devices = [{"name": name, "uuid": uuid, "memory_bytes": int(mib) * 2**20} for _, name, uuid, mib in rows]
    return {"driver": rows[0][0], "devices": devices}


def _lines(devices: list[dict[str, Any]]) -> Iterator[str]:
    for index, device in enumerate(devices):
        links = f", {device['links']} NVLinks" if device.get("links") else ""
        yield f"{index}: {device['name']}, {device['memory_bytes'] / 2**30:.1f} GiB{links}, {device['uuid']}"
