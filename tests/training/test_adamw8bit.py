"""AdamW with states of 8 bits: near plain AdamW, in a quarter of the bytes, saved and loaded bit for bit."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from siirl.checkpoint import store
from siirl.checkpoint.optimizer import optimizer_tensors
from siirl.config.loader import load
from siirl.config.schema import Config
from siirl.device.collectives import Collectives
from siirl.errors import RequestError
from siirl.model.decoder import Decoder
from siirl.model.load import load_model
from siirl.model.lora import adapt
from siirl.planning.memory import STATES
from siirl.telemetry.accumulator import StepMetrics
from siirl.training.fsdp import TrainingEngine
from siirl.training.losses import LOSSES
from siirl.worker.launch import check
from tests.training.batches import batch, config
from tests.training.test_updates import engine, update, weights

installed = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")


def model() -> Decoder:
    """Large enough for states of 8 bits: matrices of the MLP have 64 · 192 numbers."""
    made = load_model("tiny:qwen3:64:2:99", initializer_range=0.1).model
    assert isinstance(made, Decoder)
    return made


def settings(optimizer: str, **changes: object) -> Config:
    return config(training__optimizer=optimizer, training__lr=1e-3, **changes)


@installed
def test_five_steps_are_near_those_of_plain_adamw() -> None:
    """Each step moves a weight by at most about lr; states of 8 bits change that by one or two hundredths."""
    start = weights(engine(settings("sgd"), model=model()))
    plain, plain_metrics = update(settings("adamw"), batch(), steps=5, model=model())
    rough, metrics = update(settings("adamw8bit"), batch(), steps=5, model=model())
    assert metrics["actor/lr"] == pytest.approx(1e-3) and plain_metrics["actor/lr"] == pytest.approx(1e-3)
    assert metrics["actor/loss"] == pytest.approx(plain_metrics["actor/loss"], rel=1e-2)
    here, there = weights(rough), weights(plain)
    for name, before in start.items():
        if here[name].numel() < 4096:
            continue
        moved = (there[name] - before).norm()
        assert 0 < (here[name] - there[name]).norm() < 0.03 * moved  # not at all the same states, and near


@installed
def test_states_take_two_bytes_and_a_scale_for_256() -> None:
    trained, _ = update(settings("adamw8bit"), batch(), steps=1, model=model())
    assert trained.optimizer is not None
    name = "model.layers.0.mlp.up_proj.weight"
    states = optimizer_tensors(trained.model, trained.optimizer)
    count = dict(trained.model.named_parameters())[name].numel()
    found = {key.removeprefix(f"{name}."): t for key, t in states.items() if key.startswith(name)}
    assert set(found) == {"step", *(f"exp_avg{x}.{part}" for x in ("", "_sq") for part in ("codes", "scale"))}
    assert sum(t.nbytes for key, t in found.items() if key != "step") == count * STATES["adamw8bit"]


@installed
@pytest.mark.parametrize("lora", [False, True])
def test_saved_and_loaded_states_go_on_as_if_nothing_had_happened(lora: bool, tmp_path: Path) -> None:
    changes = {"training__optimizer": "adamw8bit", "training__lr": 1e-2}
    chosen = config(model__lora={"rank": 64}, **changes) if lora else config(**changes)

    def begin() -> TrainingEngine:
        made = model()
        if lora:
            adapt(made, chosen.model.lora, seed=0)
        return engine(chosen, model=made)

    def step(made: TrainingEngine, number: int) -> None:
        made.update(batch(), LOSSES["policy"](chosen.algorithm), number, StepMetrics())

    def tensors(made: TrainingEngine) -> dict[str, torch.Tensor]:
        assert made.optimizer is not None
        states = optimizer_tensors(made.model, made.optimizer)
        return states | {f"model.{name}": p.detach() for name, p in made.model.named_parameters()}

    whole = begin()
    for number in (1, 2):
        step(whole, number)
    store.save(tmp_path, "step_000002", tensors(whole), {"order": [0, 2]}, {}, Collectives.single())
    step(whole, 3)
    resumed = begin()
    store.load_tensors(tmp_path / "checkpoints" / "step_000002", tensors(resumed), Collectives.single())
    step(resumed, 3)
    assert any(".codes" in name for name in tensors(whole))
    for name, tensor in tensors(whole).items():
        assert torch.equal(tensor, tensors(resumed)[name]), name


def test_without_the_library_it_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "torchao" else found(name, *a))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("training: {optimizer: adamw8bit}\n")
    with pytest.raises(RequestError) as caught:
        check(load(recipe))
    assert str(caught.value) == (
        "training.optimizer is 'adamw8bit', which needs torchao, and that is not installed: "
        "pip install 'siirl[adamw8bit]', or set training.optimizer=adamw"
    )


def test_shards_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: name)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("training: {optimizer: adamw8bit, sharding: shard}\n")
    with pytest.raises(RequestError, match="whose states cannot be saved in shards"):
        check(load(recipe))
