"""What has to be there before PyTorch and torch_npu are imported: packages that fit, CANN, the driver, the devices."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator
from pathlib import Path

from siirl.device import host

LIBRARIES = ("libascendcl.so", "libhccl.so", "libge_runner.so")
# CANN's libraries are opened in a child: loading them early freezes ASCEND_RT_VISIBLE_DEVICES.
ASK_LIBRARIES = f"""
import ctypes, json
def loads(name):
    try:
        return bool(ctypes.CDLL(name))
    except OSError:
        return False
print(json.dumps({{"missing": [name for name in {LIBRARIES!r} if not loads(name)]}}))
"""
SET_ENV = "source CANN's set_env.sh (for example /usr/local/Ascend/ascend-toolkit/set_env.sh)"
INSTALLATIONS = ("/usr/local/Ascend/cann", "/usr/local/Ascend/ascend-toolkit/latest")
DRIVER_RECORD = Path("/etc/ascend_install.info")
DRIVER_HOME = "/usr/local/Ascend"
# The earliest release that the release notes of torch_npu 26 (PyTorch 2.11 and newer) list as compatible.
EARLIEST_CANN = (8, 5)

Finding = tuple[str, str]


def cann_version() -> str:
    """CANN's release by the record its installer leaves, the one in the environment first; empty where there is none.

    https://www.hiascend.com/document/detail/en/canncommercial/850/softwareinst/instg/instg_0044.html
    """
    homes = [os.environ[key] for key in ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME") if os.environ.get(key)]
    for home in (*homes, *INSTALLATIONS):
        record = Path(home) / f"{platform.machine()}-linux" / "ascend_toolkit_install.info"
        if version := _record(record).get("version"):
            return version
    return ""


def driver_version() -> str:
    """The driver's release by its own record; empty where there is none."""
    home = _record(DRIVER_RECORD).get("driver_install_path_param", DRIVER_HOME)
    record = _record(Path(home) / "driver" / "version.info")
    return record.get("package_version") or record.get("version", "")


def package_problems(versions: dict[str, str]) -> Iterator[Finding]:
    torch, plugin = versions.get("torch", ""), versions.get("torch-npu", "")
    release = _release(torch)
    matching = f"pip install torch-npu=={release}.*" if release else "pip install torch torch-npu"
    if not plugin:
        yield "the package torch-npu is not installed", matching
    elif release != _release(plugin):
        yield f"torch-npu {plugin} does not fit PyTorch {torch or '(not installed)'}", matching
    if cuda := host.torch_build().get("cuda"):
        refused = f"PyTorch is built for CUDA {cuda}, and torch-npu refuses it"
        yield refused, "install the CPU build of PyTorch"
    if {"triton", "triton-ascend"} <= versions.keys():
        clash = "triton and triton-ascend are both installed and overwrite each other"
        yield clash, "pip uninstall triton triton-ascend, then pip install triton-ascend"


def cann_problems(versions: dict[str, str]) -> Iterator[Finding]:
    if "torch-npu" not in versions:
        return
    earliest = ".".join(map(str, EARLIEST_CANN))
    if (cann := versions.get("cann", "")) and _numbers(cann) < EARLIEST_CANN:
        old = f"CANN {cann} is older than {earliest}, the first that torch-npu {versions['torch-npu']} works with"
        yield old, f"install CANN {earliest} or newer and {SET_ENV}"
    answer = host.ask_child(ASK_LIBRARIES)
    if "error" in answer:
        yield answer["error"], "check CANN and the driver with npu-smi info"
    elif answer["missing"]:
        unset = "" if "ASCEND_HOME_PATH" in os.environ else ", ASCEND_HOME_PATH is not set"
        missing = ", ".join(answer["missing"])
        problem = f"torch-npu is installed, but CANN's {missing} cannot be loaded{unset}"
        yield problem, SET_ENV if cann else f"install CANN and {SET_ENV}"


def _record(path: Path) -> dict[str, str]:
    """`Key=value` lines of a record, keys in lower case; nothing where it cannot be read."""
    if not path.is_file() or not os.access(path, os.R_OK):
        return {}
    pairs = (line.partition("=") for line in path.read_text().splitlines())
    return {key.strip().lower(): value.strip() for key, equals, value in pairs if equals}


def _release(version: str) -> str:
    """`2.13.0` of `2.13.0+cpu`, `2.13.0.post1` and `2.13.0rc1`."""
    found = re.match(r"\d+\.\d+\.\d+", version)
    return found[0] if found else ""


def _numbers(version: str) -> tuple[int, ...]:
    """(8, 2) of `8.2.RC1`."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])
