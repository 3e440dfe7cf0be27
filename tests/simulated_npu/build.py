"""Builds the device, once per PyTorch and source, for all processes of this user.

`$XDG_CACHE_HOME/siirl-simulated-npu/<torch>-<digest>/` holds the extension module and what makes it an installed
distribution `torch-npu`, so that PyTorch and siirl find it as they find the real one.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("source")
MODULE = "simulated_npu_device"
LABEL = "Simulated by the tests of siirl"
ENTRY_POINTS = """\
[torch.backends]
torch_npu = torch_npu:_autoload

[siirl.backends]
npu = simulated_npu_backend:SimulatedNpuBackend
"""


def missing() -> str | None:
    """Why the simulated device cannot be used on this machine, or None."""
    if sys.platform != "linux":
        return f"the simulated NPU is built for Linux, this is {sys.platform}"
    if shutil.which(compiler()) is None:
        return f"the simulated NPU needs a C++ compiler, and there is no {compiler()}"
    if real := real_plugin():
        return f"the simulated NPU does not load beside a real one, and {real} is installed"
    return None


def compiler() -> str:
    return os.environ.get("CXX", "c++").split()[0]


def real_plugin() -> str | None:
    """Name and version of an installed torch-npu that is not the simulation."""
    for distribution in importlib.metadata.distributions(name="torch-npu"):
        if distribution.metadata["Summary"] != LABEL:
            return f"torch-npu {distribution.version} in {distribution.locate_file('')}"
    return None


@functools.cache
def package_folder() -> Path:
    """The directory to put on PYTHONPATH, built if need be; other processes that want the same wait for it.

    Raises:
        RuntimeError: it cannot be built here.
    """
    if reason := missing():
        raise RuntimeError(reason)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "siirl-simulated-npu"
    folder = cache / f"{importlib.metadata.version('torch')}-{_digest()}"
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():
            with tempfile.TemporaryDirectory(dir=cache, prefix="building-") as scratch:
                made = Path(scratch) / "package"
                made.mkdir()
                _compile(Path(scratch), made)
                _describe(made)
                made.rename(folder)  # whole or absent, whoever looks
    return folder


def _digest() -> str:
    """Of everything that decides what the built module is."""
    digest = hashlib.sha256(f"{sys.implementation.cache_tag} {os.environ.get('CXX', '')}".encode())
    for path in (Path(__file__), *sorted(SOURCE.iterdir())):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _compile(scratch: Path, target: Path) -> None:
    """In a child: PyTorch's build tools are seconds to import, and leave the environment changed."""
    code = (
        "import sys; from torch.utils.cpp_extension import load; "
        "load(sys.argv[1], [sys.argv[2]], build_directory=sys.argv[3], is_python_module=False, "
        "extra_cflags=['-O1', '-g0', '-std=c++20', '-fvisibility=hidden', '-Werror=return-type'])"
    )
    command = [sys.executable, "-c", code, MODULE, str(SOURCE / "bindings.cpp"), str(scratch)]
    alone = os.environ | {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "MAX_JOBS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=alone)
    if done.returncode:
        raise RuntimeError(f"the simulated NPU does not compile:\n{done.stdout}\n{done.stderr}")
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    shutil.move(scratch / f"{MODULE}.so", target / f"{MODULE}{suffix}")


def _describe(target: Path) -> None:
    """Distribution metadata with PyTorch's own version, as every release of the extension has it."""
    version = importlib.metadata.version("torch").partition("+")[0]
    info = target / f"torch_npu-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch-npu\nVersion: {version}\nSummary: {LABEL}\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
