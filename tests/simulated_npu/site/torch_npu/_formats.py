"""Memory layouts of the device. A tensor's layout is a mark on its memory; the elements stay where they are."""

from __future__ import annotations

import enum

import simulated_npu_device as device
import torch

from torch_npu import npu


class Format(enum.IntEnum):
    """Numbers as in the documentation of npu_format_cast, of the layouts that the simulation knows."""

    NCHW = 0
    ND = 2
    FRACTAL_NZ = 29
    NCDHW = 30


UNSET = -1
BY_DIMENSIONS = {4: Format.NCHW, 5: Format.NCDHW}


def get_npu_format(self: torch.Tensor) -> Format:
    marked = device.memory_format(self)
    return BY_DIMENSIONS.get(self.dim(), Format.ND) if marked == UNSET else Format(marked)


def npu_format_cast(input: torch.Tensor, acl_format: int) -> torch.Tensor:
    """A copy in the layout; ND instead of FRACTAL_NZ unless torch_npu.npu.config.allow_internal_format is set."""
    wanted = Format(acl_format)
    if wanted == Format.FRACTAL_NZ:
        if input.dim() < 2:
            raise RuntimeError(f"npu_format_cast: FRACTAL_NZ needs two dimensions or more, the input has {input.dim()}")
        if not npu.config.allow_internal_format:
            wanted = Format.ND
    cast = input.clone()
    device.set_memory_format(cast, int(wanted))
    return cast
