"""References of the ops that end an update, over many tensors in one call: its norm, AdamW, packing for the wire."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from siirl_kernels.registry import op


@op
def gradient_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The L2 norm of all numbers of all tensors, a scalar where they are; computed in float32, float64 of such.

    The tensors are on one device; of none the norm is 0.
    """
    if not tensors:
        return torch.zeros(())
    wide = torch.float64 if tensors[0].dtype == torch.float64 else torch.float32
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(tensors), 2, dtype=wide)))


@op
def adamw_step(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """One step of AdamW (arXiv 1711.05101, algorithm 2, with the learning rate as the schedule multiplier), in place.

    p ← p - lr·wd·p;  m ← β₁·m + (1 - β₁)·g;  v ← β₂·v + (1 - β₂)·g²;
    p ← p - lr · (m / (1 - β₁ᵗ)) / (√(v / (1 - β₂ᵗ)) + eps), for step t.

    Args:
        parameters, gradients, exp_avgs, exp_avg_sqs: of each parameter p, g, m and v, of one dtype and on one device;
            all but the gradients are changed. Halves are computed in float32.
        step: t, from 1.
    """
    p, g, m, v = (list(tensors) for tensors in (parameters, gradients, exp_avgs, exp_avg_sqs))
    if not p:
        return
    if all(x.device.type == "cpu" and x.is_contiguous() for x in (*p, *g, *m, *v)):  # it reads memory, not strides
        at = [torch.tensor(float(step))] * len(p)
        how: dict[str, Any] = {"lr": lr, "beta1": beta1, "beta2": beta2, "weight_decay": weight_decay, "eps": eps}
        torch._fused_adamw_(p, g, m, v, [], at, **how, amsgrad=False, maximize=False)
        return
    if p[0].dtype in (torch.float32, torch.float64):
        _adamw(p, g, m, v, step, lr, beta1, beta2, eps, weight_decay)
        return
    wide_p, wide_g, wide_m, wide_v = ([x.float() for x in tensors] for tensors in (p, g, m, v))
    _adamw(wide_p, wide_g, wide_m, wide_v, step, lr, beta1, beta2, eps, weight_decay)
    for narrow, computed in ((p, wide_p), (m, wide_m), (v, wide_v)):
        torch._foreach_copy_(narrow, computed)


def _adamw(
    p: list[Tensor],
    g: list[Tensor],
    m: list[Tensor],
    v: list[Tensor],
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """In PyTorch's order of operations, so that its optimiser gives the same bits."""
    torch._foreach_mul_(p, 1.0 - lr * weight_decay)
    torch._foreach_lerp_(m, g, 1.0 - beta1)
    torch._foreach_mul_(v, beta2)
    torch._foreach_addcmul_(v, g, g, 1.0 - beta2)
    root = torch._foreach_sqrt(v)
    torch._foreach_div_(root, (1.0 - beta2**step) ** 0.5)
    torch._foreach_add_(root, eps)
    torch._foreach_addcdiv_(p, m, root, -lr / (1.0 - beta1**step))


@op
def cast_pack(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """All numbers of all tensors, in order, rounded to ``dtype``: one contiguous [N] where they are, for the wire.

    Each number is read once and written once, whatever its dtype.
    """
    sizes = [x.numel() for x in tensors]
    packed = torch.empty(sum(sizes), dtype=dtype, device=tensors[0].device if tensors else None)
    for x, piece in zip(tensors, packed.split(sizes), strict=True):
        piece.view(x.shape).copy_(x.detach())
    return packed
