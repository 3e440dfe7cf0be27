"""Training of adapters: the gradient is that of the formula, the split does not matter, the rest stays as it was."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from siirl.checkpoint.optimizer import optimizer_tensors
from siirl.config.schema import Config
from siirl.device.collectives import Collectives
from siirl.model.critic import ValueModel
from siirl.model.decoder import Decoder
from siirl.model.lora import adapt, adapted, is_adapter, scale_of
from siirl.telemetry.accumulator import StepMetrics
from siirl.training.fsdp import TrainingEngine
from siirl.training.losses import LOSSES
from siirl.training.shared_reference import SharedReference
from tests import device_under_test
from tests.training.batches import batch, config, decoder
from tests.training.test_updates import engine, padded_policy_loss, update, weights

LORA = {"rank": 3, "alpha": 6.0}


def settings(**changes: object) -> Config:
    return config(**({"model__lora": LORA} | changes))


def with_adapters(config: Config) -> Decoder:
    """Adapters in the middle of their training: B is not zero."""
    model = decoder()
    adapt(model, config.model.lora, seed=5)
    generator = torch.Generator().manual_seed(6)
    for _, layer in adapted(model):
        layer.lora_B.data.normal_(0, 0.1, generator=generator)
    return model


def trained_adapters(made: TrainingEngine) -> dict[str, torch.Tensor]:
    return {name: tensor.cpu().clone() for name, tensor in made.parts(adapters=True)}


def start(made: TrainingEngine, seed: int = 6) -> None:
    """B as :func:`with_adapters` has it, for an engine whose stage began with zeros."""
    generator = torch.Generator().manual_seed(seed)
    for _, layer in adapted(made.model):
        layer.lora_B.data.copy_(torch.empty(layer.lora_B.shape).normal_(0, 0.1, generator=generator))


def test_the_update_is_the_gradient_through_the_merged_weights() -> None:
    """By the chain rule dL/dA = s Bᵀ dL/dW and dL/dB = s dL/dW Aᵀ, with dL/dW of a plain model with merged weights."""
    chosen, samples = settings(), batch().drop(["ref_log_probs"])
    made = engine(chosen, model=with_adapters(chosen))
    start(made)
    plain = decoder()
    plain.load_state_dict(weights(made))
    padded_policy_loss(plain, samples, chosen).backward()
    before = {name: (layer.lora_A.detach().cpu(), layer.lora_B.detach().cpu()) for name, layer in adapted(made.model)}
    before = {name: (a.clone(), b.clone()) for name, (a, b) in before.items()}
    made.update(samples, LOSSES["policy"](chosen.algorithm), 1, StepMetrics())
    after, scale = trained_adapters(made), scale_of(chosen.model.lora)
    for name, (a, b) in before.items():
        gradient = plain.get_submodule(name).weight.grad
        torch.testing.assert_close(after[f"{name}.lora_A"], a - 0.5 * scale * b.t() @ gradient, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(after[f"{name}.lora_B"], b - 0.5 * scale * gradient @ a.t(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nothing_but_adapters_is_optimised_or_changes(dtype: str) -> None:
    chosen = settings(training__optimizer="adamw", training__lr=1e-2, training__dtype=dtype)
    made = engine(chosen, model=with_adapters(chosen))
    start(made)
    base = {name: tensor.clone() for name, tensor in made.parts(adapters=False)}
    adapters = trained_adapters(made)
    made.update(batch(), LOSSES["policy"](chosen.algorithm), 1, StepMetrics())
    assert all(torch.equal(tensor, base[name]) for name, tensor in made.parts(adapters=False))
    assert not any(torch.equal(tensor, adapters[name]) for name, tensor in trained_adapters(made).items())
    assert made.optimizer is not None
    states = optimizer_tensors(made.model, made.optimizer)
    assert {name.rpartition(".")[0] for name in states} == set(adapters)
    assert all(p.grad is None for name, p in made.model.named_parameters() if not is_adapter(name))
    norm = StepMetrics()
    made.update(batch(), LOSSES["policy"](chosen.algorithm), 2, norm)
    assert norm.reduce(Collectives.single())["actor/grad_norm"] > 0


def test_a_critic_trains_adapters_and_its_head() -> None:
    chosen = settings()
    critic = ValueModel(with_adapters(chosen))
    made, _ = update(chosen, batch(), "value", steps=2, model=critic)
    untouched = decoder()
    assert made.model.value_head.weight.any()
    base = {name.removeprefix("decoder."): tensor for name, tensor in made.parts(adapters=False)}
    for name, tensor in untouched.named_parameters():
        if not any(name == f"{path}.weight" for path, _ in adapted(made.model.decoder)):
            assert torch.equal(base[name].cpu(), tensor.detach())


def test_the_reference_is_the_actor_without_adapters() -> None:
    """Bit for bit the actor as it was, from the actor's own tensors."""
    chosen = settings()
    samples = batch().drop(["old_log_probs", "ref_log_probs"])
    first = decoder()
    adapt(first, chosen.model.lora, seed=5)
    made = engine(chosen, model=first)
    before = made.log_probs(samples, 1).values
    reference = SharedReference(made)
    made.update(samples, LOSSES["policy"](chosen.algorithm), 1, StepMetrics())
    assert torch.equal(reference.log_probs(samples, 1).values, before)
    assert not torch.equal(made.log_probs(samples, 1).values, before)


def test_a_stage_that_trains_all_weights_leaves_the_adapters_out() -> None:
    lora, full = settings(), config()
    made = engine(full, model=with_adapters(lora))
    adapters = trained_adapters(made)
    plain = decoder()
    plain.load_state_dict(weights(made))
    alone = engine(full, model=plain)
    for each in (made, alone):
        each.update(batch(), LOSSES["policy"](full.algorithm), 1, StepMetrics())
    for name, tensor in weights(alone).items():
        assert torch.equal(weights(made)[name], tensor)
    assert all(torch.equal(tensor, adapters[name]) for name, tensor in trained_adapters(made).items())


def _run(collectives: Collectives | None, sharding: str, rows: list[int]) -> tuple[dict, dict]:
    """Two stages of adapters with one of all weights between them, 3 steps each."""
    changes = {"training__sharding": sharding, "training__micro_batch_tokens": 24, "algorithm__mini_batches": 2}
    chosen, full = settings(**changes), config(**changes)
    backend, workers = device_under_test.backend(), collectives or Collectives.single()
    made = TrainingEngine(with_adapters(chosen), chosen.training, backend, workers, "actor")
    metrics, samples = StepMetrics(), batch().take(rows)
    for stage in (chosen, full, chosen):
        made.begin(stage, 0.1)
        for step in range(1, 4):
            made.update(samples, LOSSES["policy"](stage.algorithm), step, metrics)
    return weights(made) | trained_adapters(made), metrics.reduce(workers)


def _worker(rank: int, size: int, port: int, sharding: str, rows: list[list[int]], folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    backend = device_under_test.backend()
    backend.bind(rank)
    collectives = Collectives.init(backend, rank, size, 60)
    torch.save(_run(collectives, sharding, rows[rank]), f"{folder}/{rank}.pt")
    collectives.close()


@pytest.mark.parametrize("sharding", ["replicate", "shard"])
def test_workers_do_not_change_the_update(sharding: str, tmp_path: Path) -> None:
    rows = [[0, 1, 2, 3, 6, 7], [4, 5, 8, 9, 10, 11]]
    alone, expected = _run(None, "replicate", list(range(12)))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_worker, (len(rows), port, sharding, rows, str(tmp_path)), nprocs=len(rows))
    for rank in range(len(rows)):
        own, metrics = torch.load(f"{tmp_path}/{rank}.pt", weights_only=True)
        assert metrics == pytest.approx(expected, rel=1e-3, abs=1e-5)
        assert own.keys() == alone.keys()
        for name, tensor in alone.items():
            torch.testing.assert_close(own[name], tensor, atol=3e-5, rtol=1e-4)
