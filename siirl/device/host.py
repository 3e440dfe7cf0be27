"""Facts of the host that need no PyTorch: cores, memory, CPU features, installed packages."""

from __future__ import annotations

import ast
import ctypes
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

CGROUP = Path("/sys/fs/cgroup")

# Parameters of glibc's mallopt: larger pieces are mappings of their own; so much free memory at the end is kept.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT, _OWN_MAPPING = 2**30, 2**25


def installed(distribution: str) -> str | None:
    """The version of an installed distribution, None when it is not there."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def torch_build() -> dict[str, Any]:
    """What PyTorch was built for: the assignments of its `version.py`, read without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return {}
    tree = ast.parse(_read(Path(spec.origin).with_name("version.py")))
    build = {}
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Constant):
            target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
            build[ast.unparse(target)] = node.value.value
    return build


def ask_child(code: str, timeout_s: float = 20.0) -> dict[str, Any]:
    """Run Python `code` in a bare child and return the JSON object it prints.

    Vendor libraries are tried there, because opening a driver can freeze the visible devices, forbid a later fork,
    hang or crash. What went wrong comes back as {"error": sentence}.
    """
    try:
        child = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return {"error": f"the driver did not answer within {timeout_s:g} s"}
    if child.returncode != 0:
        last = child.stderr.decode(errors="replace").strip().splitlines()[-1:]
        return {"error": f"the driver check ended with status {child.returncode}" + (f": {last[0]}" if last else "")}
    return json.loads(child.stdout)


def usable_cores() -> int:
    """Cores this process may use: its affinity mask, cut by the CPU quota of its control groups."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for text in _control_group_files("cpu.max"):
        quota, period = text.split()
        if quota != "max":
            cores = min(cores, math.ceil(int(quota) / int(period)))
    return max(cores, 1)


def memory_total() -> int:
    """Bytes of memory this process may use: the machine's, cut by the limit of its control groups."""
    meminfo = _fields("/proc/meminfo")
    total = meminfo["MemTotal"] if meminfo else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [int(text) for text in _control_group_files("memory.max") if text != "max"]
    return min([total, *limits])


def memory_available() -> int:
    """Bytes that can still be allocated without swapping."""
    meminfo = _fields("/proc/meminfo")
    free = [meminfo["MemAvailable"] if meminfo else memory_total() - process_memory()[0]]
    limits, used = _control_group_files("memory.max"), _control_group_files("memory.current")
    free += [int(most) - int(now) for most, now in zip(limits, used, strict=False) if most != "max"]
    return max(min(free), 0)


def process_memory() -> tuple[int, int]:
    """Resident bytes of this process: now, and at the peak since it began or since `reset_process_peak`."""
    status = _fields("/proc/self/status")
    if "VmHWM" in status:
        return status["VmRSS"], status["VmHWM"]
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return peak, peak


def keep_freed_memory() -> None:
    """Let this process keep what it frees, for what it allocates next, where the C library can (glibc's mallopt).

    The system clears every page that it gives, which costs more than most passes over that memory.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, _OWN_MAPPING)
        libc.mallopt(_M_TRIM_THRESHOLD, _KEPT)


def release_free_memory() -> None:
    """Give the system back what this process has freed, where the C library can (glibc's malloc_trim)."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def reset_process_peak() -> bool:
    """Start the peak of `process_memory` anew (Linux, `clear_refs` 5 in proc(5)); False where that is impossible."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def cpu_name() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def cpu_flags() -> frozenset[str]:
    """Instruction-set features by their names in /proc/cpuinfo; empty where there is none."""
    return frozenset((_cpuinfo("flags") or _cpuinfo("Features")).split())


def _cpuinfo(key: str) -> str:
    for line in _read("/proc/cpuinfo").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return ""


def _fields(path: str) -> dict[str, int]:
    """`Name: 123 kB` lines of a /proc file, in bytes."""
    lines = (line.split() for line in _read(path).splitlines())
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if len(words) == 3 and words[2] == "kB"}


def _control_group_files(name: str) -> list[str]:
    """The file of that name of every version 2 control group this process is in, innermost first."""
    inside = next((line[3:] for line in _read("/proc/self/cgroup").splitlines() if line.startswith("0::")), "/")
    folder = CGROUP / inside.lstrip("/")
    groups = [group for group in (folder, *folder.parents) if group.is_relative_to(CGROUP)]
    return [text for group in groups if (text := _read(group / name).strip())]


def _read(path: str | Path) -> str:
    return Path(path).read_text() if os.path.isfile(path) else ""
