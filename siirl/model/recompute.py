"""Activations that are computed again in the backward pass instead of kept, or wait for it in the host's memory.

*full*: a layer keeps its input alone and runs again (Chen et al. 2016, arXiv 1604.06174). *selective*: what costs
little, norms and the MLP's gate, leaves neither its intermediates nor its result behind; matrix products and attention,
whose results are dear, run once (Korthikanti et al. 2022, arXiv 2205.05198, recompute attention, whose scores are not
kept here in any case). A recomputed tensor has the bits of the first one. *Full* therefore gives the very same
gradients, and *selective* the same to rounding: an op's two contributions to its input's gradient are added to one
another first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

# Results that may still have a reader to come: both norms over heads run between a layer's norm and its last reader.
_RECENT = 4
# Smaller tensors stay where they are: a copy to the host and back costs more than they do.
_LEAST_BYTES = 2**16


class _Result:
    """A cheap op's result as its readers' backward passes see it: made from the op's inputs, once for all of them."""

    def __init__(self, function: Callable[..., Tensor], inputs: tuple[Any, ...]) -> None:
        self.function = function
        self._inputs = [x.detach() if isinstance(x, Tensor) else x for x in inputs]
        self.readers = 0
        self._value: Tensor | None = None

    def take(self, shape: torch.Size) -> Tensor:
        """For one reader; the last one leaves nothing behind."""
        if self._value is None:
            with torch.no_grad():
                self._value = self.function(*self._inputs)
        value = self._value.view(shape)
        self.readers -= 1
        if not self.readers:
            self._value = None
        return value


class _Cheap(torch.autograd.Function):
    """Keeps an op's inputs, not its intermediates."""

    @staticmethod
    def forward(ctx: Any, result: _Result, *inputs: Any) -> Tensor:
        ctx.result, ctx.places = result, [i for i, x in enumerate(inputs) if isinstance(x, Tensor)]
        ctx.others = [None if isinstance(x, Tensor) else x for x in inputs]
        ctx.save_for_backward(*(inputs[i] for i in ctx.places))
        return result.function(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs = list(ctx.others)
        for place, tensor in zip(ctx.places, ctx.saved_tensors, strict=True):
            inputs[place] = tensor.detach().requires_grad_(ctx.needs_input_grad[place + 1])
        with torch.enable_grad():
            out = ctx.result.function(*inputs)
        wanted = [i for i in ctx.places if ctx.needs_input_grad[i + 1]]
        grads = dict(zip(wanted, torch.autograd.grad(out, [inputs[i] for i in wanted], grad), strict=True))
        return None, *(grads.get(i) for i in range(len(inputs)))


class Selective:
    """The results of cheap ops in one forward pass, and the hooks by which their readers keep the way to them."""

    def __init__(self) -> None:
        self._recent: dict[int, tuple[Tensor, _Result]] = {}

    def cheap(self, function: Callable[..., Tensor], *inputs: Any) -> Tensor:
        """``function(*inputs)``, computed again where the backward pass needs it."""
        result = _Result(function, inputs)
        out = _Cheap.apply(result, *inputs)
        # kept alive, so that no other tensor can lie at its address as long as that stands for it
        self._recent[out.data_ptr()] = (out, result)
        if len(self._recent) > _RECENT:
            del self._recent[next(iter(self._recent))]
        return out

    def end(self) -> None:
        """The pass is over: hooks outlive it, and must not hold its results."""
        self._recent.clear()

    def pack(self, tensor: Tensor) -> Tensor | tuple[_Result, torch.Size]:
        out, result = self._recent.get(tensor.data_ptr(), (None, None))
        if out is None or result is None or tensor.numel() != out.numel() or tensor.dtype != out.dtype:
            return tensor
        if not (tensor.is_contiguous() and out.is_contiguous()):
            return tensor
        result.readers += 1
        return result, tensor.shape

    @staticmethod
    def unpack(packed: Tensor | tuple[_Result, torch.Size]) -> Tensor:
        return packed if isinstance(packed, Tensor) else packed[0].take(packed[1])


_active: ContextVar[Selective | None] = ContextVar("selective", default=None)


@contextmanager
def selective() -> Iterator[None]:
    """What :func:`cheap` computes meanwhile is computed again in the backward pass."""
    current = Selective()
    token = _active.set(current)
    try:
        with saved_tensors_hooks(current.pack, Selective.unpack):
            yield
    finally:
        _active.reset(token)
        current.end()


def cheap(function: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """``function(*inputs)``: an op that costs little beside the matrix products around it.

    Inside :func:`selective`, where gradients are recorded, nothing of it is kept but its inputs.
    """
    current = _active.get()
    if current is None or not torch.is_grad_enabled():
        return function(*inputs)
    return current.cheap(function, *inputs)


def recompute_layers(module: nn.Module) -> None:
    """Let each layer keep its input alone (*full*)."""
    for layer in layers(module):
        layer.forward = partial(_again, layer.forward)


def offload_layers(module: nn.Module, pinned: bool) -> None:
    """Let what layers keep for the backward pass wait in the host's memory, ``pinned`` where the device copies so."""
    for layer in layers(module):
        layer.forward = partial(_offloaded, layer, layer.forward, pinned)


def layers(module: nn.Module) -> list[nn.Module]:
    """The layers of a decoder, of siirl or of `transformers`: the members of its outermost lists of modules."""
    inside = [m for m in module.modules() if isinstance(m, nn.ModuleList)]
    nested = {id(inner) for stack in inside for part in stack for inner in part.modules()}
    return [layer for stack in inside if id(stack) not in nested for layer in stack]


def _again(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def _offloaded(layer: nn.Module, forward: Callable[..., Any], pinned: bool, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    weights = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    copies: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}  # with the source, whose address stands for it

    def pack(tensor: Tensor) -> Tensor | tuple[torch.device, Tensor]:
        if tensor.untyped_storage().data_ptr() in weights or tensor.nbytes < _LEAST_BYTES:
            return tensor
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if key not in copies:
            copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=pinned)
            copies[key] = tensor, copy.copy_(tensor, non_blocking=pinned)
        return tensor.device, copies[key][1]

    def unpack(packed: Tensor | tuple[torch.device, Tensor]) -> Tensor:
        return packed if isinstance(packed, Tensor) else packed[1].to(packed[0], non_blocking=pinned)

    with saved_tensors_hooks(pack, unpack):
        return forward(*args, **kwargs)
