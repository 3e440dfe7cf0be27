"""Where Triton can run: on a GPU that it compiles for, or on the host under its interpreter."""

from __future__ import annotations

import importlib.util
import os
import shutil

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FUSED = {"enable_fp_fusion": True}  # a launch's option: a product and a sum may round once; Triton's default changes
OLDEST = (8, 0)  # compute capability of the first GPUs that multiply bfloat16


def unavailable() -> str | None:
    """Why no kernel can run here, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; pip install 'siirl[cuda]' brings it"
    if interpreted():
        return None
    if not torch.accelerator.is_available():
        return "PyTorch finds no GPU, and TRITON_INTERPRET=1, which runs the kernels on the host, is not set"
    if torch.cuda.is_available() and torch.version.cuda and torch.cuda.get_device_capability() < OLDEST:
        has, wants = (".".join(map(str, pair)) for pair in (torch.cuda.get_device_capability(), OLDEST))
        return f"its kernels want a GPU of compute capability {wants} or higher, this one has {has}"
    if not os.environ.get("CC") and not shutil.which("gcc") and not shutil.which("clang"):
        return "Triton needs a C compiler; install gcc or clang, or name one in CC"
    return None


def interpreted() -> bool:
    """Whether kernels are interpreted; Triton looks when it meets a kernel first."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def reachable(*tensors: Tensor) -> bool:
    """Whether kernels reach the tensors, which are on one device and have no gaps in the last dimension."""
    device = tensors[0].device
    if device.type == "cpu" and not interpreted():
        return False
    return all(x.device == device and (x.stride(-1) == 1 or x.shape[-1] == 1) for x in tensors)


def alike(*tensors: Tensor) -> bool:
    """Whether kernels reach the tensors and they are of one dtype that kernels take."""
    dtype = tensors[0].dtype
    return dtype in DTYPES and all(x.dtype == dtype for x in tensors) and reachable(*tensors)
