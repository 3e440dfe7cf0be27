"""The tensors of an optimiser by the names of the parameters they belong to."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from siirl.training.optimizer import set_rate


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """State tensors as ``PARAMETER.KEY``: the live ones, so that filling them restores the optimiser.

    An optimiser that has not stepped yet has no state; it is made to hold zeros first. A state of 8 bits is two
    tensors, ``PARAMETER.KEY.codes`` and ``PARAMETER.KEY.scale``.
    """
    _materialize(optimizer)
    return {
        f"{name}.{key}": tensor
        for name, parameter in model.named_parameters()
        for state, value in optimizer.state.get(parameter, {}).items()
        for key, tensor in _plain(state, value)
    }


def _plain(key: str, value: object) -> list[tuple[str, Tensor]]:
    """The tensors that a state is made of; none where it is a number."""
    if isinstance(value, Tensor) and hasattr(value, "codes") and hasattr(value, "scale"):
        return [(f"{key}.codes", value.codes), (f"{key}.scale", value.scale)]
    return [(key, value)] if isinstance(value, Tensor) else []


def _materialize(optimizer: torch.optim.Optimizer) -> None:
    """Step once with zero gradients and learning rate 0, which changes no weight, and take back the count."""
    if optimizer.state:
        return
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        set_rate(group, 0.0)
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        set_rate(group, rate)
    for state in optimizer.state.values():
        if "step" in state:
            state["step"].zero_()
