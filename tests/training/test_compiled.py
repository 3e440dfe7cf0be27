"""Compiled layers compute what they compute eagerly: loss, gradients, weights after steps; with adapters too."""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from siirl.config.schema import Config
from siirl.device.collectives import Collectives
from siirl.errors import RequestError
from siirl.model.lora import adapt
from siirl.training.compiled import compile_layers
from siirl_kernels import bind
from tests import device_under_test
from tests.training.batches import batch, config, decoder
from tests.training.test_updates import engine, update, weights

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler"),
]


def settings(compiled: bool, **changes: object) -> Config:
    return config(training__compile=compiled, training__micro_batch_tokens=24, algorithm__kl_coef=0.1, **changes)


@pytest.mark.parametrize("lora", [0, 4])
def test_updates_are_those_of_eager_layers(lora: int) -> None:
    """With the kernels that the device binds, in several micro-batches of different sizes."""
    backend = device_under_test.backend()
    bind(backend.kernel_order())
    torch._dynamo.reset()
    changes = {"model__lora": {"rank": lora, "alpha": 4.0}} if lora else {}

    def run(compiled: bool) -> tuple[dict, dict, torch.Tensor]:
        chosen, model = settings(compiled, **changes), decoder()
        if lora:
            adapt(model, chosen.model.lora, seed=0)
        made, metrics = update(chosen, batch(), steps=3, model=model)
        return weights(made), metrics, made.log_probs(batch(), 1).values

    (eager, expected, before), (compiled, metrics, after) = run(False), run(True)
    assert metrics == pytest.approx(expected, rel=1e-4, abs=1e-6)
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)
    for name, tensor in eager.items():
        torch.testing.assert_close(compiled[name], tensor, atol=1e-5, rtol=1e-4)


def test_no_part_is_compiled_again_for_another_layer_or_number_of_tokens() -> None:
    backend = device_under_test.backend()
    bind(backend.kernel_order())
    torch._dynamo.reset()
    made = engine(settings(True))
    samples = batch()
    made.log_probs(samples, 1)
    with torch.compiler.set_stance("fail_on_recompile"):
        made.log_probs(samples.take(torch.tensor([2, 5, 8])), 1)
        made.log_probs(samples.take(torch.arange(1, 9)), 1)  # a single token alone would be a graph of its own


def test_a_model_without_layers_of_ours_is_refused() -> None:
    with pytest.raises(RequestError, match="set training.compile=false"):
        compile_layers(torch.nn.Linear(2, 2))


def _worker(rank: int, size: int, port: int, rows: list[list[int]], folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    backend = device_under_test.backend()
    backend.bind(rank)
    collectives = Collectives.init(backend, rank, size, 300)
    chosen = settings(True, training__sharding="shard")
    trained, metrics = update(chosen, batch().take(rows[rank]), steps=3, collectives=collectives)
    torch.save((weights(trained), metrics), f"{folder}/{rank}.pt")
    collectives.close()


@pytest.mark.long
def test_sharded_and_compiled(tmp_path: Path) -> None:
    rows = [[0, 1, 2, 3, 6, 7], [4, 5, 8, 9, 10, 11]]
    alone, expected = update(settings(False), batch(), steps=3)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_worker, (len(rows), port, rows, str(tmp_path)), nprocs=len(rows))
    for rank in range(len(rows)):
        own, metrics = torch.load(f"{tmp_path}/{rank}.pt", weights_only=True)
        assert metrics == pytest.approx(expected, rel=1e-4, abs=1e-6)
        for name, tensor in weights(alone).items():
            torch.testing.assert_close(own[name], tensor, atol=1e-5, rtol=1e-4)
