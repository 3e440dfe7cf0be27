"""Adapters that do not reach the rollout engine are noticed: dropped, not merged, late, or beside another base."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from siirl.config.schema import Config
from siirl.device.collectives import Collectives
from siirl.errors import RequestError, SiirlError
from siirl.model.lora import adapted, is_adapter
from siirl.rollout.checksum import weights_checksum
from siirl.training import fsdp
from siirl.training.shared_reference import SharedReference
from siirl.worker import adapters as module
from siirl.worker.models import Models
from siirl.worker.weights import WeightReceiver, WeightSender
from siirl_kernels import bind
from tests import device_under_test
from tests.worker.test_weight_sync import Wire


def models(dtype: str = "float32", role: Any = "all", wanted: Iterable[str] = (), first: bool = True) -> Models:
    config = Config.model_validate(
        {
            "model": {"path": "tiny:qwen3:32:2:99", "initializer_range": 0.1, "lora": {"rank": 4}},
            "training": {"dtype": dtype},
        }
    )
    backend = device_under_test.backend()
    bind(backend.kernel_order())
    made = Models(config, backend, Collectives.single(), role)
    made.begin_stage(config, wanted, first=first)
    return made


def train(made: Models, seed: int = 0) -> None:
    """A large step of training, of adapters alone."""
    generator = torch.Generator().manual_seed(seed)
    for _, layer in adapted(made.actor.model):
        layer.lora_B.data.add_(torch.randn(layer.lora_B.shape, generator=generator).to(layer.lora_B.device))


def engine_weights(made: Models) -> dict[str, Tensor]:
    return {name: p.detach().float().cpu().clone() for name, p in made.rollout.decoder.named_parameters()}  # type: ignore[attr-defined]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_engine_holds_the_merged_weights(dtype: str) -> None:
    made = models(dtype)
    train(made)
    made.sync_rollout()
    held = engine_weights(made)
    names = {f"{name}.weight": layer for name, layer in adapted(made.actor.model)}
    for name, parameter in made.actor.parts(adapters=False):
        expected = parameter.double().cpu()
        if name in names:
            a, b = names[name].lora_A.detach().double().cpu(), names[name].lora_B.detach().double().cpu()
            expected = expected + 32 / 4 * b @ a
        tolerance = {"atol": 1e-5, "rtol": 1e-5} if dtype == "float32" else {"atol": 0.05, "rtol": 2e-2}
        torch.testing.assert_close(held[name].double(), expected, **tolerance)


def test_the_weights_that_are_not_trained_are_in_memory_once_for_actor_and_reference() -> None:
    made = models(wanted=["reference"])
    assert isinstance(made["reference"], SharedReference)
    assert list(made.engines) == ["actor"]  # no second model
    owned = {p.data_ptr() for p in made.actor.model.parameters()}
    assert made["reference"]._actor is made.actor and len(owned) == len(list(made.actor.model.parameters()))
    assert not any("reference" in name for name in made.tensors())
    assert all(is_adapter(name.removeprefix("actor.model.")) or "optimizer" in name for name in made.tensors())


def test_a_reference_of_its_own_is_loaded() -> None:
    config = models()._config.model_copy(deep=True)
    config.model.reference = config.model.path
    made = models()
    made.begin_stage(config, ["reference"], first=True)
    assert "reference" in made.engines


# Faults, planted where adapters go from training to generation.


def test_merging_that_is_skipped_by_training_is_reported_by_the_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own checksum is right then: what is sent is what arrives."""
    made = models()
    train(made)
    monkeypatch.setattr(fsdp, "merged_weights", lambda model, whole, dtype=None: made.actor.parts(adapters=False))
    with pytest.raises(SiirlError) as caught:
        made.sync_rollout()
    said = str(caught.value)
    assert said.startswith("the rollout engine does not compute with the weights of version 2 as training does: ")
    assert "\n" not in said


class Placed:
    """A worker that trains and one that generates, and the wire between them."""

    def __init__(self, dtype: str = "float32") -> None:
        self.training, self.rollout = models(dtype, "training"), models(dtype, "rollout")
        self.wire, merger = Wire(), self.rollout.merger
        assert merger is not None
        moving, frozen = merger.room()
        self.sender = WeightSender(self.wire, self.training.sent_names(), self.training.rollout_dtype)
        self.receiver = WeightReceiver(self.wire, moving, self.rollout.probe, frozen)

    def send(self, step: int, base: bool = False) -> int:
        """Bytes of weights that travelled."""
        self.wire.receiving = False
        moving, frozen = self.training.sent_weights(base)
        self.sender.send(step, moving, self.training.answers(), frozen)
        return sum(t.nbytes for t in self.wire.sent if t.is_floating_point())

    def take(self) -> None:
        self.wire.receiving = True
        message = self.receiver.receive()
        assert message.weights is not None and message.answers is not None
        self.rollout.take_weights(message.weights, message.checksum, message.answers)

    def sync(self, step: int, base: bool = False) -> None:
        self.send(step, base)
        self.take()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_only_adapters_travel_and_the_receiver_merges(dtype: str) -> None:
    placed = Placed(dtype)
    placed.sync(0, base=True)
    itemsize = 4 if dtype == "float32" else 2
    own = {name: p.numel() for name, p in placed.training.actor.model.named_parameters()}
    for step in (1, 2, 3):
        train(placed.training, step)
        sent = placed.send(step)
        assert sent == itemsize * sum(count for name, count in own.items() if is_adapter(name))
        placed.take()
    here, there = (
        dict(placed.training.actor.named_weights(placed.training.rollout_dtype)),
        engine_weights(placed.rollout),
    )
    for name, tensor in here.items():  # as where both share a worker, bit for bit
        assert torch.equal(tensor.to(placed.training.rollout_dtype).float().cpu(), there[name])


def test_a_base_of_its_own_reaches_the_receiver() -> None:
    """After a warm-up that trained all weights: nobody else could know them."""
    placed = Placed()
    with torch.no_grad():
        for parameter in placed.training.actor.model.parameters():
            parameter.add_(0.1)
    placed.sync(0, base=True)
    train(placed.training)
    placed.sync(1)


def test_an_adapter_that_changes_on_the_way_is_noticed() -> None:
    placed = Placed()
    placed.sync(0, base=True)
    train(placed.training)
    placed.send(1)
    placed.wire.sent[1][17] += 1e-3
    with pytest.raises(SiirlError, match="^weights of version 2 did not arrive as they were sent"):
        placed.take()


def test_adapters_of_the_step_before_are_noticed() -> None:
    placed = Placed()
    placed.sync(0, base=True)
    train(placed.training)
    placed.send(1)
    placed.wire.sent[1].zero_()
    with pytest.raises(SiirlError, match="^weights of version 2 did not arrive as they were sent"):
        placed.take()


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.lora_B", "model.layers.0.self_attn.q_proj.lora_A"])
def test_an_adapter_that_is_dropped_is_named(name: str) -> None:
    placed = Placed()
    placed.sync(0, base=True)
    train(placed.training)
    placed.send(1)
    placed.wire.receiving = True
    message = placed.receiver.receive()
    assert message.weights is not None and message.answers is not None
    rest = [pair for pair in message.weights if pair[0] != name]
    with pytest.raises(SiirlError) as caught:
        placed.rollout.take_weights(rest, message.checksum, message.answers)
    assert str(caught.value) == f"weights of version 2 did not arrive whole: {name} is missing"


def test_a_receiver_that_does_not_merge_is_reported_by_the_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    """It holds what was sent, so no checksum can tell."""
    placed = Placed()
    placed.sync(0, base=True)
    train(placed.training)
    skipped = lambda parts, scale: ((n, t) for n, t in parts.items() if not is_adapter(n))  # noqa: E731
    monkeypatch.setattr(module, "merged_parts", skipped)
    placed.send(1)
    with pytest.raises(SiirlError) as caught:
        placed.take()
    said = str(caught.value)
    assert said.startswith("the rollout engine does not compute with the weights of version 2 as training does: ")
    assert "\n" not in said


def test_a_receiver_that_merges_another_scale_is_reported_by_the_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    placed = Placed()
    assert placed.rollout.merger is not None
    placed.sync(0, base=True)
    train(placed.training)
    placed.rollout.merger._scale *= 1.1
    placed.send(1)
    with pytest.raises(SiirlError, match="^the rollout engine does not compute with the weights of version 2"):
        placed.take()


def test_a_checkpoint_knows_its_base_and_its_rank() -> None:
    made = models()
    saved = made.adapters_state()
    assert saved is not None and saved["lora"]["rank"] == 4
    assert saved["base"] == {"actor": weights_checksum(made.actor.parts(adapters=False))}
    made.check_adapters_state(saved)
    with pytest.raises(RequestError, match="model.lora.rank=8, and this one has 4"):
        made.check_adapters_state(saved | {"lora": saved["lora"] | {"rank": 8}})
    with pytest.raises(RequestError, match="model.lora.rank=0, and this one has 4"):
        made.check_adapters_state(None)
    next(iter(made.actor.model.parameters())).data.view(-1)[0] += 1
    with pytest.raises(RequestError, match="adapters of the actor, and its model's files hold other weights"):
        made.check_adapters_state(saved)


def test_a_base_that_no_file_has_is_in_the_checkpoint() -> None:
    made = models(first=False)
    names = {name.removeprefix("actor.model.") for name in made.tensors() if "optimizer" not in name}
    assert names == {name for name, _ in made.actor.model.named_parameters()}
    saved = made.adapters_state()
    assert saved is not None and saved["base"] == {}
