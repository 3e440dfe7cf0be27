"""Weights that do not arrive are noticed: dropped, changed on the way, late, or old ones under a new number."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from siirl.config.schema import Config
from siirl.data.batch import Batch, Ragged
from siirl.device.collectives import Collectives
from siirl.errors import SiirlError
from siirl.rollout.checksum import weights_checksum
from siirl.rollout.engine import NativeEngine
from siirl.rollout.probe import Answers, Probe, compare
from siirl.rollout.sampling import Sampling
from siirl.worker.models import Models
from siirl.worker.weights import Message, WeightReceiver, WeightSender
from siirl_kernels import bind
from tests import device_under_test
from tests.worker import runs

_update = NativeEngine.update_weights


def models(dtype: str = "bfloat16", **rollout: Any) -> Models:
    """An actor and an engine with weights of its own, as bfloat16 training has them."""
    config = Config.model_validate(
        {
            "model": {"path": "tiny:qwen3:32:2:99", "initializer_range": 0.1},
            "training": {"dtype": dtype},
            "rollout": rollout,
        }
    )
    backend = device_under_test.backend()
    bind(backend.kernel_order())
    made = Models(config, backend, Collectives.single())
    made.begin_stage(config, [], first=True)
    return made


def train(actor: Any, seed: int = 0) -> None:
    """Some step of training, a large one: what is unlike before is unlike enough for the probe too."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in actor.model.parameters():
            parameter.add_((0.5 * torch.randn(parameter.shape, generator=g)).to(parameter.device))


def test_weights_arrive_and_both_sides_agree() -> None:
    made = models()
    train(made.actor)
    made.sync_rollout()
    assert made.rollout.version == made.version == 2


def test_tensors_that_both_sides_compute_with_do_not_move(monkeypatch: pytest.MonkeyPatch) -> None:
    made = models("float32")
    moved: list[Any] = []

    def watched(self: NativeEngine, named: Iterable[tuple[str, Tensor]], *rest: Any) -> None:
        moved.extend(named)
        _update(self, (), *rest)

    monkeypatch.setattr(NativeEngine, "update_weights", watched)
    made.sync_rollout()
    assert moved == [] and made.rollout.version == 2


def dropped(self: NativeEngine, named: Iterable[tuple[str, Tensor]], version: int, checksum: int | None = None) -> None:
    _update(self, [pair for pair in named if "layers.1.mlp.up_proj" not in pair[0]], version, checksum)


def late(self: NativeEngine, named: Iterable[tuple[str, Tensor]], version: int, checksum: int | None = None) -> None:
    for _ in named:
        pass


def half(self: NativeEngine, named: Iterable[tuple[str, Tensor]], version: int, checksum: int | None = None) -> None:
    _update(self, [(name, t / 2 if t.dim() == 1 else t) for name, t in named], version, checksum)


def unconfirmed(
    self: NativeEngine, named: Iterable[tuple[str, Tensor]], version: int, checksum: int | None = None
) -> None:
    self.version = version


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (dropped, "weights of version 2 did not arrive whole: model.layers.1.mlp.up_proj.weight is missing"),
        (late, "weights of version 2 did not arrive: the rollout engine is at version 1"),
        (half, "weights of version 2 did not arrive as they were sent"),
        (unconfirmed, "the rollout engine does not compute with the weights of version 2 as training does"),
    ],
)
def test_a_sync_that_goes_wrong(wrong: Any, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = models()
    train(made.actor)
    monkeypatch.setattr(NativeEngine, "update_weights", wrong)
    with pytest.raises(SiirlError) as caught:
        made.sync_rollout()
    assert str(caught.value).startswith(says) and "\n" not in str(caught.value)


def test_old_weights_under_a_new_number_with_their_own_checksum() -> None:
    """What a trainer sends from a copy that it forgot to renew: no checksum can tell, the probe does."""
    made = models()
    old = [(name, weight.clone()) for name, weight in made.actor.named_weights()]
    train(made.actor)
    with pytest.raises(SiirlError, match="does not compute with the weights of version 2 as training does: the log-"):
        made.take_weights(old, weights_checksum(old, made.rollout_dtype), made.answers())


def test_a_response_of_other_weights_than_the_newest_is_refused() -> None:
    made = models("float32")
    made.rollout.version -= 1
    with pytest.raises(SiirlError, match="weights of version 1 did not arrive: the rollout engine is at version 0"):
        made.generate([[3, 4]], torch.tensor([0]), Sampling(2), 1, 0)


def test_the_bound_is_a_key() -> None:
    for bound in (0.8, 0.5):
        made = models(probe_bound=bound)
        named, answers = list(made.actor.named_weights()), made.answers()
        apart = replace(answers, log_probs=answers.log_probs + 0.65)
        outcome = nullcontext() if bound > 0.65 else pytest.raises(SiirlError, match="rollout.probe_bound is 0.5")
        with outcome:
            made.take_weights(named, weights_checksum(named, made.rollout_dtype), apart)


def test_the_answers_are_the_log_probs_that_training_computes() -> None:
    """`greedy` against the pass that old log-probs come from, and against the logits written down."""
    made = models("float32")
    answers = made.answers()
    prompts = [torch.tensor(prompt) for prompt in made.probe.prompts]
    rows = torch.arange(len(prompts))
    batch = Batch(
        {
            "sample_id": rows,
            "slot": rows,
            "prompt_ids": Ragged.from_lists(prompts, torch.int64),
            "response_ids": Ragged.from_lists(list(answers.tokens), torch.int64),
        }
    )
    found = made.actor.log_probs(batch, 1).values.view(len(prompts), -1)
    torch.testing.assert_close(found, answers.log_probs, atol=1e-5, rtol=0)
    assert made.probe.tokens == 2 and sorted(map(len, prompts)) == [2, 4, 6, 8]


def test_a_tie_is_no_difference_and_what_follows_is_not_compared() -> None:
    made = models("float32")
    done = made.generate(made.probe.prompts, made.probe.sample_ids, made.probe.sampling, 1, 0)
    answers = made.answers()
    assert compare(answers, done, 1e-4) < 1e-4
    tokens, log_probs = answers.tokens.clone(), answers.log_probs.clone()
    tokens[1, 0] += 1
    log_probs[1, 1:] = -99.0
    assert compare(Answers(tokens, log_probs), done, 1e-4) < 1e-4
    log_probs[1, 0] = float("nan")
    with pytest.raises(SiirlError, match="token 1 after probe prompt 2"):
        compare(Answers(tokens, log_probs), done, 1e-4)


def test_prompts_fit_the_vocabulary_and_the_run() -> None:
    for vocabulary in (2, 99, 150_000):
        probe = Probe.of(vocabulary, 7, longest_prompt=4, longest_response=2)
        assert max(map(len, probe.prompts)) <= 4 and min(map(len, probe.prompts)) >= 1 and probe.tokens == 2
        assert all(0 <= token < vocabulary for prompt in probe.prompts for token in prompt)
        assert probe == Probe.of(vocabulary, 7, 4, 2)


class Wire(Collectives):
    """Both ends of a broadcast in one process: what one sends, the other receives, perhaps not as it was."""

    def __init__(self) -> None:
        super().__init__(None, 0, 1, 1.0)
        self.sent: list[Tensor] = []
        self.receiving = False

    def broadcast(self, t: Tensor, src: int = 0) -> Tensor:
        if self.receiving:
            return t.copy_(self.sent.pop(0))
        self.sent.append(t.clone())
        return t


def carried(sender_side: Models, wire: Wire) -> tuple[WeightReceiver, list[tuple[str, Tensor]]]:
    named = [(name, weight) for name, weight in sender_side.actor.named_weights()]
    sender = WeightSender(wire, [name for name, _ in named], sender_side.rollout_dtype)
    sender.send(5, named, sender_side.answers())
    like = list(sender_side.rollout.decoder.named_parameters())
    wire.receiving = True
    return WeightReceiver(wire, like, sender_side.probe), named


def take(made: Models, message: Message) -> None:
    assert message.weights is not None and message.answers is not None
    made.take_weights(message.weights, message.checksum, message.answers)


def test_a_message_carries_weights_checksum_and_answers() -> None:
    made, wire = models(), Wire()
    train(made.actor)
    receiver, named = carried(made, wire)
    message = receiver.receive()
    assert message.step == 5 and message.weights is not None and message.answers is not None
    assert message.checksum == weights_checksum(named, torch.bfloat16)
    answers = made.answers()
    assert torch.equal(message.answers.tokens, answers.tokens)
    assert torch.equal(message.answers.log_probs, answers.log_probs.double())
    take(made, message)


def test_weights_that_change_between_workers_are_noticed() -> None:
    made, wire = models(), Wire()
    receiver, _ = carried(made, wire)
    wire.sent[1][17] += 1  # a single number of the weights
    with pytest.raises(SiirlError, match="weights of version 2 did not arrive as they were sent"):
        take(made, receiver.receive())


def test_the_message_before_once_more_is_noticed() -> None:
    """Old weights in the place of new ones, with all that belongs to them but the checksum and the answers."""
    made, wire = models(), Wire()
    carried(made, wire)
    old = wire.sent[1:-1]
    wire.sent, wire.receiving = [], False
    train(made.actor)
    receiver, _ = carried(made, wire)
    wire.sent[1:-1] = old
    with pytest.raises(SiirlError, match="weights of version 2 did not arrive as they were sent"):
        take(made, receiver.receive())


STALE = """
import torch

kept = []

def freeze(batch, context):
    actor = context.models.actor
    if not kept:
        kept.extend((name, weight.clone()) for name, weight in actor.named_weights())
        actor.named_weights = lambda: iter(kept)
    return {"seen": torch.ones(len(batch))}
"""


@pytest.mark.slow
def test_a_run_whose_trainer_sends_the_weights_of_the_start_ends(tmp_path: Path) -> None:
    """Two processes: the step after, the worker that generates says what is wrong."""
    shipped = (Path(__file__).parents[2] / "configs" / "pipelines" / "grpo.yaml").read_text()
    (tmp_path / "stale.py").write_text(STALE)
    node = f"""  - id: freeze
    op: python:{tmp_path}/stale.py:freeze
    layout: tokens
    reads: [response_ids]
    writes: [seen]

  - id: update
"""
    head, _, tail = shipped.partition("  - id: update\n")
    (tmp_path / "stale.yaml").write_text(head + node + tail.replace("policy_version,", "policy_version, seen,"))
    recipe = runs.write_recipe(tmp_path)
    placed = ("placement=disaggregated", "workers=2", "rollout.workers=1")
    said = runs.run(recipe, tmp_path / "run", f"pipeline={tmp_path}/stale.yaml", *placed, status=1)
    assert "the rollout engine does not compute with the weights of version" in said
    assert said.count("\n") == 1 and len(runs.metrics(tmp_path / "run")) < 3
