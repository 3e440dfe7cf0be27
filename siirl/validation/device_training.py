"""L1: what training asks of a device beyond single operators."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from siirl.device.collectives import Collectives
from siirl.validation.checks import NotApplicable, check, require
from siirl.validation.numbers import distance, same
from siirl.validation.subject import Subject

EXIT = """
import sys, torch
from importlib import import_module
backend = getattr(import_module(sys.argv[1]), sys.argv[2])()
from siirl.device.selection import prepare
prepare(backend); backend.load(); backend.bind(0)

class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): return 2 * x
    @staticmethod
    def backward(ctx, grad): return 2 * grad

x = torch.ones(1000, device=backend.device(), requires_grad=True)
x.register_hook(lambda grad: grad)
Double.apply(x).sum().backward()
"""


def _gradient(subject: Subject, recompute: bool) -> tuple[Tensor, Tensor]:
    """Gradient and output of a network with dropout."""
    layers = nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.5), nn.Linear(64, 64), nn.Dropout(0.5))
    with torch.no_grad():
        for number, parameter in enumerate(layers.parameters()):
            parameter.normal_(generator=torch.Generator().manual_seed(number))
    layers.to(subject.backend.device())
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(9)).to(subject.backend.device()).requires_grad_()
    subject.backend.seed(5)
    out = checkpoint(layers, x, use_reentrant=False) if recompute else layers(x)
    return torch.autograd.grad(out.square().sum(), x)[0], out


@check("L1", "activation checkpointing repeats the dropout of the forward pass")
def checkpointed_dropout(subject: Subject) -> None:
    (grad, out), (plain, expected) = _gradient(subject, True), _gradient(subject, False)
    require(bool((expected == 0).any()), "dropout drops nothing")
    subject.measure("error of outputs", distance(out, expected), 1e-6)
    subject.measure("error of gradients", distance(grad, plain), 1e-6)


@check("L1", "a module that moves between host and device keeps its parameters, their ties and its optimiser")
def parameters_move(subject: Subject) -> None:
    device = subject.backend.device()
    one, two = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    weight = two.weight = one.weight
    module = nn.Sequential(one, two)
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    weight.data = weight.data.to(device)
    require(weight.device.type == device.type, f"param.data on {device} leaves the parameter on {weight.device}")
    for place in ("cpu", device):
        module.to(place)
        require(one.weight is weight, f"moving to {place} makes a new parameter")
        require(two.weight is weight, f"moving to {place} unties weights")
    weight.grad = torch.ones_like(weight)
    before = weight.detach().clone()
    optimizer.step()
    same(two.weight, before - 1, "the weight after a step of SGD")


@check("L1", "a tensor can be kept for a stream that uses it")
def record_stream(subject: Subject) -> None:
    if subject.backend.memory().unified:
        raise NotApplicable("the host computes in order and frees nothing early")
    x, stream = torch.ones(1000, device=subject.backend.device()), subject.backend.stream()
    stream.wait_stream(torch.accelerator.current_stream())
    with stream:
        y = x + 1
    x.record_stream(stream)
    del x
    stream.synchronize()
    same(y, torch.full((1000,), 2.0), "work on another stream")


def _rng_of_shards(collectives: Collectives, device_type: str) -> tuple[Tensor, int]:
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh(device_type, (collectives.size,))
    sharded = distribute_tensor(torch.zeros(24, 4, device=device_type), mesh, [Shard(0)])
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a host's shards are drawn by the host's generator
        nn.init.normal_(sharded)
    return sharded.full_tensor().cpu(), sharded.to_local().shape[0]


@check("L1", "sharded tensors are initialised at random, the same on every worker")
def sharded_random(subject: Subject) -> None:
    answers = subject.world.run(_rng_of_shards, subject.backend.torch_type)
    whole = answers[0][0]
    for other, _ in answers[1:]:
        same(other, whole, "the whole tensor on another worker")
    require(sum(rows for _, rows in answers) == 24, f"shards have {[rows for _, rows in answers]} rows of 24")
    require(0.5 < float(whole.std()) < 1.5, f"96 normal numbers have a deviation of {float(whole.std()):.3g}")


def _on_device(collectives: Collectives, device_type: str) -> list[float]:
    x = torch.arange(4.0, device=device_type, requires_grad=True)
    return torch.autograd.grad(x.square().sum(), x)[0].tolist()


@check("L1", "a spawned process computes on its device")
def spawned_process(subject: Subject) -> None:
    for rank, found in enumerate(subject.world.run(_on_device, subject.backend.torch_type)):
        require(found == [0.0, 2.0, 4.0, 6.0], f"the gradient of x² is {found} in process {rank}")


@check("L1", "a process that ends right after a backward pass ends well")
def exit_after_backward(subject: Subject) -> None:
    kind = type(subject.backend)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", EXIT, kind.__module__, kind.__qualname__]
    for _ in range(5 if subject.depth == "full" else 1):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        said = done.stderr.strip().splitlines()
        require(done.returncode == 0, f"exit status {done.returncode}: {said[-1] if said else ''}")


def _saved_and_loaded(tensors: dict[str, Tensor], device: torch.device, pickled: bool) -> tuple[dict[str, Any], ...]:
    """The tensors saved from the device, read to the host and to the device."""
    if not pickled:
        written = save(tensors)
        read = load(written)
        return read, {name: x.to(device) for name, x in read.items()}
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    places = []
    for place in ("cpu", device):
        buffer.seek(0)
        places.append(torch.load(buffer, map_location=place, weights_only=True))
    return tuple(places)


@check(
    "L1",
    "what is saved on the device is read on the host and on the device, bit for bit",
    lambda _: (("safetensors",), ("torch",)),
)
def save_and_load(subject: Subject, form: str) -> None:
    device = subject.backend.device()
    source = {
        "matrix": torch.randn(5, 7),
        "half": torch.randn(3).bfloat16(),
        "ints": torch.arange(4),
        "none": torch.ones(0),
    }
    moved = {name: x.to(device) for name, x in source.items()}
    for read in _saved_and_loaded(moved, device, form == "torch"):
        for name, x in source.items():
            same(read[name], x, name)


@check("L1", "a tensor in PyTorch's own layout has the values it had")
def canonical_layout(subject: Subject) -> None:
    host = torch.randn(16, 32, generator=torch.Generator().manual_seed(0))
    x = host.to(subject.backend.device())
    views: dict[str, Callable[[Tensor], Tensor]] = {
        "matrix": lambda x: x,
        "transpose": lambda x: x.t(),
        "part": lambda x: x[3:5, ::2],
    }
    for what, view in views.items():
        same(subject.backend.to_canonical(view(x)), view(host), what)
    weights = nn.Linear(32, 16, bias=False).to(x.device)
    product = weights(x)  # a product may change the layout of its weight
    canonical = subject.backend.to_canonical(weights.weight.detach())
    subject.measure("error of a product with the host's copy", distance(product, host @ canonical.cpu().t()), 1e-5)


@check("L1", "the profiler sees the operators that run")
def profiler(subject: Subject) -> None:
    x = torch.ones(64, 64, device=subject.backend.device())
    with subject.backend.profiler() as profile:
        x @ x
        subject.backend.synchronize()
    seen = {event.key for event in profile.key_averages()}
    require(bool(seen & {"aten::mm", "aten::matmul"}), f"a product ran, {len(seen)} other events are recorded")
