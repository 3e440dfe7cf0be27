"""Compiles the C++ beside this file, once per machine, into a shared library in the user's cache.

The library's name holds a hash of the sources, the flags, the compiler's version and the CPU's features, so nothing
stale is ever loaded. It appears by a rename, so processes that compile at once do not disturb each other.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-shared", "-ffp-contract=fast", "-Wno-psabi")
COMPILERS = ("c++", "g++", "clang++")
_HERE = Path(__file__).parent


class Unavailable(Exception):
    """Why there is no library, in words."""


@functools.cache
def unavailable() -> str | None:
    """Why the C++ kernels cannot run here, None if they can; compiles them if need be."""
    try:
        library()
    except Unavailable as error:
        return str(error)
    return None


@functools.cache
def library() -> ctypes.CDLL:
    """The loaded library.

    Raises:
        Unavailable: there is no compiler, or it fails.
    """
    path = compiled()
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise Unavailable(f"{path} does not load: {error}") from None


def compiled() -> Path:
    """The library's file, compiled if it is not there yet.

    Raises:
        Unavailable: there is no compiler, or it fails.
    """
    command = _compiler()
    sources = sorted(_HERE.glob("*.cpp"))
    flags = [*FLAGS, *_threads()]
    name = f"kernels-{_digest(command, flags, sources)}.so"
    for folder in (_cache(), Path(tempfile.gettempdir()) / f"siirl-{os.getuid()}"):
        if _mine(folder):
            target = folder / name
            if not target.exists():
                _compile([*command, *flags[: len(FLAGS)], *map(str, sources), *flags[len(FLAGS) :]], target)
            return target
    raise Unavailable(f"neither {_cache()} nor {tempfile.gettempdir()} can be written to")


def _compiler() -> list[str]:
    chosen = os.environ.get("CXX", "").split()
    if chosen:
        if shutil.which(chosen[0]) is None:
            raise Unavailable(f"the compiler that CXX names, {chosen[0]}, is not there")
        return chosen
    found = next((name for name in COMPILERS if shutil.which(name)), None)
    if found is None:
        raise Unavailable(f"no C++ compiler was found ({', '.join(COMPILERS)}, or one that CXX names)")
    return [found]


def _threads() -> list[str]:
    """Flags for OpenMP on the very runtime that PyTorch loaded, which counts its threads; none if that is another."""
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.exists() else []
    runtime = next((line.split(maxsplit=5)[-1] for line in lines if "/libgomp" in line), None)
    return ["-fopenmp", runtime] if runtime else []


def _digest(command: list[str], flags: list[str], sources: list[Path]) -> str:
    version = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False).stdout
    digest = hashlib.sha256("\0".join([*command, *flags, version, platform.machine(), _cpu()]).encode())
    for source in sorted([*sources, *_HERE.glob("*.h")]):
        digest.update(source.name.encode() + source.read_bytes())
    return digest.hexdigest()[:16]


def _cpu() -> str:
    """The CPU's features, which the machine's code is made for."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "siirl"


def _mine(folder: Path) -> bool:
    """Whether this user alone can put a library there that would then be loaded."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK) and folder.stat().st_uid == os.getuid()


def _compile(command: list[str], target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        made = Path(scratch) / target.name
        done = subprocess.run([*command, "-o", str(made)], capture_output=True, text=True, check=False)
        if done.returncode != 0 or not made.exists():
            said = done.stderr.strip().splitlines() or [f"exit {done.returncode}"]
            first = next((line for line in said if "error" in line), said[0])
            raise Unavailable(f"{command[0]} fails: {first}")
        os.replace(made, target)
