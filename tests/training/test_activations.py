"""Less memory, the same update: recomputation, offloading, and shards in the host's memory."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from siirl.device.collectives import Collectives
from siirl.errors import RequestError
from siirl.model import recompute
from siirl.model.critic import ValueModel
from siirl.model.fallback import TransformersDecoder
from siirl.model.recompute import cheap, offload_layers, selective
from tests import device_under_test
from tests.training.batches import batch, config, decoder
from tests.training.test_updates import engine, update, weights
from tests.training.workers import together

ROWS = [[0, 1, 2, 3, 6, 7], [4, 5, 8, 9, 10, 11]]
ADAMW = {"optimizer": "adamw", "lr": 0.01, "eps": 1e-3}  # so large that rounding of a gradient near 0 moves nothing
MODES: dict[str, dict[str, Any]] = {
    "replicate selective": {"sharding": "replicate", "recompute": "selective"},
    "replicate full": {"sharding": "replicate", "recompute": "full"},
    "shard selective": {"sharding": "shard", "recompute": "selective"},
    "shard full": {"sharding": "shard", "recompute": "full", "offload_activations": True},
    "shard on host": {"sharding": "shard", "cpu_offload": True},
    "shard full on host": {"sharding": "shard", "cpu_offload": True, "recompute": "full", **ADAMW},
}


def gpt2() -> TransformersDecoder:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return TransformersDecoder(GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4)))


def train(model: nn.Module, loss: str = "policy", **training: object) -> tuple[dict[str, Tensor], dict[str, float]]:
    keys = {f"training__{name}": value for name, value in training.items()}
    trained, metrics = update(config(training__micro_batch_tokens=24, **keys), batch(), loss, steps=3, model=model)
    return weights(trained), metrics


def model_of(loss: str) -> nn.Module:
    return ValueModel(decoder()) if loss == "value" else decoder()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("loss", ["policy", "value"])
def test_layers_that_run_again_give_the_same_bits(loss: str, dtype: str) -> None:
    plain, expected = train(model_of(loss), loss, dtype=dtype)
    again, metrics = train(model_of(loss), loss, dtype=dtype, recompute="full")
    assert metrics == expected
    assert all(torch.equal(again[name], tensor) for name, tensor in plain.items())


@pytest.mark.parametrize("loss", ["policy", "value"])
def test_selective_recomputation_gives_the_same_weights_to_rounding(loss: str) -> None:
    plain, expected = train(model_of(loss), loss)
    again, metrics = train(model_of(loss), loss, recompute="selective")
    assert metrics == pytest.approx(expected, rel=1e-5, abs=1e-6)
    for name, tensor in plain.items():
        torch.testing.assert_close(again[name], tensor, atol=2e-6, rtol=0)


def test_in_bfloat16_selective_gradients_are_no_farther_from_float32_than_plain_ones() -> None:
    def moved(**training: object) -> Tensor:
        """One update of plain SGD with rate 1, whose size is the gradient's."""
        keys = {f"training__{name}": value for name, value in training.items()}
        trained, _ = update(config(training__lr=1.0, training__micro_batch_tokens=1000, **keys), batch())
        return torch.cat([tensor.flatten() for tensor in weights(trained).values()])

    exact = moved()
    plain, some = ((moved(dtype="bfloat16", recompute=mode) - exact).norm() for mode in ("none", "selective"))
    assert 0 < some < 1.25 * plain


def test_a_model_run_by_transformers_recomputes_its_layers_too() -> None:
    plain, _ = train(gpt2())
    again, _ = train(gpt2(), recompute="full")
    assert all(torch.equal(again[name], tensor) for name, tensor in plain.items())
    calls = []
    watched = gpt2()
    watched.inner.transformer.h[0].mlp.register_forward_hook(lambda *_: calls.append(1))
    trained = engine(config(training__recompute="full", training__micro_batch_tokens=1000), model=watched)
    trained.log_probs(batch(), 1)
    assert len(calls) == 1  # nothing is recomputed where nothing is trained
    with pytest.raises(RequestError, match="set training.recompute=full"):
        train(gpt2(), recompute="selective")


def _all_modes(collectives: Collectives) -> dict[str, dict[str, Tensor]]:
    found = {}
    for name, keys in MODES.items():
        settings = config(training__micro_batch_tokens=64, **{f"training__{key}": value for key, value in keys.items()})
        trained, _ = update(settings, batch().take(ROWS[collectives.rank]), steps=3, collectives=collectives)
        if keys.get("cpu_offload"):
            assert all(p.device.type == "cpu" for p in trained.model.parameters())
        found[name] = weights(trained)
    return found


@pytest.mark.slow
def test_two_workers_reach_the_weights_of_one_plain_worker(tmp_path: Path) -> None:
    plain = {"sgd": train(decoder())[0], "adamw": train(decoder(), **ADAMW)[0]}
    for found in together(_all_modes, 2, tmp_path):
        for mode, keys in MODES.items():
            for name, tensor in plain[keys.get("optimizer", "sgd")].items():
                torch.testing.assert_close(found[mode][name], tensor, atol=2e-5, rtol=1e-5, msg=f"{mode}: {name}")


@pytest.mark.parametrize("mode", ["none", "full"])
def test_activations_in_the_hosts_memory_give_the_same_bits(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device under test may be the host: the copies are made all the same."""
    monkeypatch.setattr(recompute, "_LEAST_BYTES", 0)
    plain, _ = train(decoder())
    made = []
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: made.append(k.get("device")) or empty(*a, **k))
    model = decoder()
    if mode == "full":
        recompute.recompute_layers(model)
    offload_layers(model, pinned=False)
    offloaded, _ = train(model)
    assert all(torch.equal(offloaded[name], tensor) for name, tensor in plain.items())
    assert made.count("cpu") > 6


def test_what_cannot_be_is_said_in_a_sentence(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(RequestError, match=r"set training\.recompute=none or full"):
        engine(config(training__recompute="selective", training__offload_activations=True))
    with pytest.raises(RequestError, match=r"training\.sharding=shard and workers=2 or more"):
        engine(config(training__cpu_offload=True, training__sharding="shard"))
    if device_under_test.backend().memory().unified:
        with caplog.at_level(logging.INFO):
            engine(config(training__offload_activations=True))
        assert "nothing is offloaded" in caplog.text


def test_a_cheap_result_is_made_once_for_all_its_readers_and_left_behind_by_the_last() -> None:
    made = []

    def twice(x: Tensor) -> Tensor:
        made.append(1)
        return 2 * x

    x = torch.randn(5, 3, requires_grad=True)
    readers = [torch.randn(3, 3, requires_grad=True) for _ in range(3)]
    with selective():
        y = cheap(twice, x)
        total = sum((y @ w).square().sum() for w in readers)
        others = [cheap(twice, x) for _ in range(5)]  # push it out of what is remembered
    del y, others
    assert len(made) == 6
    total.backward()
    assert len(made) == 8  # once for three readers, once for its own gradient
    want = torch.autograd.grad(sum((2 * x @ w).square().sum() for w in readers), [x, *readers])
    for got, expected in zip([x.grad, *(w.grad for w in readers)], want, strict=True):
        torch.testing.assert_close(got, expected)


def test_a_tensor_at_a_forgotten_results_address_is_not_taken_for_it() -> None:
    x = torch.randn(64, 64, requires_grad=True)
    with selective():
        for _ in range(50):  # results are freed and their memory used again
            y = cheap(torch.sigmoid, x.detach().requires_grad_())
            del y
            w = torch.randn(64, 64)
            (x * w).sum().backward()
            torch.testing.assert_close(x.grad, w)
            x.grad = None
