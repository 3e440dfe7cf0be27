"""L3: what several workers train together is what one trains alone, and a checkpoint brings it back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from siirl.checkpoint import store
from siirl.checkpoint.optimizer import optimizer_tensors
from siirl.device import current
from siirl.device.collectives import Collectives
from siirl.training.fsdp import TrainingEngine
from siirl.validation import tiny
from siirl.validation.checks import check, require
from siirl.validation.numbers import distance, same
from siirl.validation.subject import Subject

STEPS = 2
SHARDINGS = (("replicate",), ("shard",))


def _trained(collectives: Collectives, **training: Any) -> tuple[TrainingEngine, dict[str, Any]]:
    config, batch = tiny.settings(**training), tiny.samples()
    mine = torch.arange(collectives.rank, len(batch), collectives.size)
    trained = tiny.engine(config, current(), collectives)
    return trained, tiny.train(trained, config, batch.take(mine), collectives, STEPS)


def _train_share(collectives: Collectives, sharding: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    trained, metrics = _trained(collectives, sharding=sharding)
    return tiny.weights(trained), metrics


@check("L3", "training on shares of the samples gives the weights and metrics of one worker", lambda _: SHARDINGS)
def data_parallel(subject: Subject, sharding: str) -> None:
    alone, single = tiny.settings(), Collectives.single()
    engine = tiny.engine(alone, subject.backend, single)
    metrics = tiny.train(engine, alone, tiny.samples(), single, STEPS)
    expected, start = tiny.weights(engine), dict(tiny.decoder().named_parameters())
    answers = subject.world.run(_train_share, sharding, deadline_s=120.0)
    for rank, (weights, found) in enumerate(answers):
        moved = [distance(weights[name] - start[name], expected[name] - start[name]) for name in expected]
        subject.measure(f"relative error of the weights' change, worker {rank}", max(moved), 1e-3)
        for key in ("actor/loss", "actor/grad_norm", "actor/entropy"):
            error = abs(found[key] - metrics[key]) / max(abs(metrics[key]), 1e-2)
            subject.measure(f"{key} off by, worker {rank}", error, 1e-4)
    for weights, _ in answers[1:]:
        for name, weight in answers[0][0].items():
            same(weights[name], weight, f"{name} on another worker")


def _save(collectives: Collectives, directory: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    trained, _ = _trained(collectives, sharding="shard", optimizer="adamw", lr=1e-2)
    tensors, moments = _tensors(trained)
    store.save(Path(directory), "step_000002", tensors | moments, {"order": [0, 2]}, {}, collectives)
    whole = {name: _whole(tensor) for name, tensor in moments.items()}
    return tiny.weights(trained), whole


def _tensors(trained: TrainingEngine) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    assert trained.optimizer is not None
    state = optimizer_tensors(trained.model, trained.optimizer)
    weights = {f"model.{name}": parameter.detach() for name, parameter in trained.model.named_parameters()}
    return weights, {f"optimizer.{name}": tensor for name, tensor in state.items()}


def _whole(tensor: Tensor) -> Tensor:
    gather = getattr(tensor, "full_tensor", None)
    return (tensor if gather is None else gather()).detach().cpu().clone()


@check("L3", "a checkpoint of sharded weights and moments is read by one worker, bit for bit")
def checkpoint(subject: Subject) -> None:
    directory = subject.scratch / "checkpoint"
    directory.mkdir(exist_ok=True)
    weights, moments = subject.world.run(_save, str(directory), deadline_s=120.0)[0]
    (saved,) = store.checkpoints(directory)
    store.load_state(saved)
    config = tiny.settings(optimizer="adamw", lr=1e-2)
    fresh = tiny.engine(config, subject.backend, Collectives.single(), tiny.decoder(seed=4))
    tensors, state = _tensors(fresh)
    store.load_tensors(saved, tensors | state, Collectives.single())
    for name, expected in weights.items():
        same(tensors[f"model.{name}"], expected, name)
    require(state.keys() == moments.keys(), "the optimiser's tensors have other names")
    for name, expected in moments.items():
        same(state[name], expected, name)


def _layers() -> nn.Sequential:
    layers = nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 5))
    with torch.no_grad():
        for number, parameter in enumerate(layers.parameters()):
            parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(number))
    return layers


def _step(layers: nn.Module, x: Tensor, share: float) -> float:
    """One clipped step of AdamW; the norm of the gradient before it was clipped."""
    optimizer = torch.optim.AdamW(layers.parameters(), lr=1e-2)
    (layers(x).square().sum() * share).backward()
    norm = nn.utils.clip_grad_norm_(layers.parameters(), 0.1)
    optimizer.step()
    return float(_whole(norm))


def _inputs() -> Tensor:
    return torch.randn(12, 24, generator=torch.Generator().manual_seed(5))


def _offloaded(collectives: Collectives) -> tuple[dict[str, Tensor], float]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

    backend = current()
    layers, mesh = _layers(), init_device_mesh(backend.torch_type, (collectives.size,))
    fully_shard(layers, mesh=mesh, offload_policy=CPUOffloadPolicy(pin_memory=backend.capabilities().pin_memory))
    mine = _inputs()[collectives.rank :: collectives.size].to(backend.device())
    norm = _step(layers, mine, float(collectives.size))
    whole = {}
    for name, parameter in layers.named_parameters():
        require(parameter.device.type == "cpu", f"{name} is on {parameter.device} after a step, not on the host")
        whole[name] = _whole(parameter.to(backend.torch_type))
    return whole, norm


@check("L3", "sharded training with parameters on the host clips gradients and steps as one worker does")
def cpu_offload(subject: Subject) -> None:
    plain = _layers()
    norm = _step(plain, _inputs(), 1.0)
    for rank, (weights, found) in enumerate(subject.world.run(_offloaded, deadline_s=120.0)):
        subject.measure(f"norm of the gradient off by, worker {rank}", abs(found / norm - 1), 1e-4)
        for name, expected in plain.named_parameters():
            subject.measure(f"{name} off by, worker {rank}", distance(weights[name], expected), 1e-4)
