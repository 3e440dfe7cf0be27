"""Running out of memory inside a layer, without leaving the pass.

A pass of a sharded model is a row of collectives, and all workers have to make the same ones. So a layer in which
memory runs out, forward or backward, must not end its worker's pass: it hands on what it got, the layers behind it
compute nothing more, and at the end it is known that the pass was in vain.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from siirl.model.recompute import layers

Results = tuple[Tensor, ...]


def out_of_memory(error: BaseException) -> bool:
    """Whether PyTorch had no memory: a device's allocator has an error of its own, the host's has a message."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: " in str(error)


class Containment:
    """Of one model: whether its last pass ran out of memory."""

    def __init__(self, module: nn.Module) -> None:
        """Contain each of the module's layers."""
        self._said: str | None = None
        self._anchor = torch.zeros(
            (), requires_grad=True
        )  # a layer without a gradient to pass on has its own parameters'
        for layer in layers(module):
            layer.forward = partial(self._layer, layer, layer.forward)

    def take(self) -> str | None:
        """What the allocator said in the pass before, None where there was memory; the next pass begins."""
        said, self._said = self._said, None
        return said

    def attempt(self, function: Callable[..., Any], *args: Any) -> Any:
        """``function(*args)``; None where memory ran out, now or before in this pass."""
        if self._said is not None:
            return None
        try:
            return function(*args)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            self._said = str(error)
        return None

    def call(
        self,
        function: Callable[..., Results],
        instead: Callable[..., Results],
        parameters: Iterable[nn.Parameter],
        *x: Tensor,
    ) -> Results:
        """``function(*x)``, or ``instead(*x)`` where there is no memory; differentiable in ``x`` and ``parameters``."""
        if torch.is_grad_enabled():
            return _Contained.apply(self._anchor, self, function, instead, parameters, *x)
        found = self.attempt(function, *x)
        return instead(*x) if found is None else found

    def _layer(self, layer: nn.Module, forward: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        def run(inner: Tensor) -> Results:
            return (forward(inner, *args, **kwargs),)

        return self.call(run, lambda inner: (inner.view_as(inner),), _Parameters(layer), x)[0]


class _Parameters:
    """A module's parameters at the moment they are asked for: sharding changes them around a pass."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __iter__(self) -> Any:
        return self._module.parameters()


class _Contained(torch.autograd.Function):
    """A graph within the graph, whose backward pass can fail alone."""

    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor,
        owner: Containment,
        function: Callable[..., Results],
        instead: Callable[..., Results],
        parameters: Iterable[nn.Parameter],
        *x: Tensor,
    ) -> Results:
        inner = tuple(tensor.detach().requires_grad_(tensor.requires_grad) for tensor in x)
        with torch.enable_grad():
            found = owner.attempt(function, *inner)
        ctx.owner, ctx.parameters, ctx.inner, ctx.found = owner, parameters, inner, found
        return instead(*x) if found is None else tuple(tensor.detach() for tensor in found)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inner, found = ctx.inner, ctx.found
        ctx.inner = ctx.found = None
        done = found is not None and ctx.owner.attempt(_backward, found, grads)
        if not done:
            _fill(ctx.parameters, inner)
        return None, None, None, None, None, *(tensor.grad for tensor in inner)


def _backward(found: Results, grads: Results) -> bool:
    torch.autograd.backward(found, grads)
    return True


def _fill(parameters: Iterable[nn.Parameter], inner: Results) -> None:
    """Some gradient for whoever waits for one; nobody reads it."""
    for parameter in parameters:
        if parameter.requires_grad and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    for tensor in inner:
        if tensor.requires_grad:
            tensor.grad = None
            tensor.grad = torch.zeros_like(tensor)
