"""An update is the same number whatever the split: micro-batches, workers, replicated or sharded."""

from __future__ import annotations

import os
import socket

import pytest
import torch
import torch.multiprocessing as mp

from siirl.config.schema import Config
from siirl.data.batch import Batch
from siirl.device.collectives import Collectives
from siirl.model.critic import ValueModel
from siirl.model.decoder import Decoder
from siirl.telemetry.accumulator import StepMetrics
from siirl.training.fsdp import TrainingEngine
from siirl.training.losses import LOSSES
from siirl.training.optimizer import lr_factor
from tests import device_under_test
from tests.training.batches import batch, config, decoder

AGGREGATIONS = ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]


def engine(
    settings: Config, collectives: Collectives | None = None, model: torch.nn.Module | None = None
) -> TrainingEngine:
    backend, workers = device_under_test.backend(), collectives or Collectives.single()
    made = TrainingEngine(model or decoder(), settings.training, backend, workers, "actor")
    made.begin(settings, settings.training.lr)
    return made


def update(
    settings: Config, samples: Batch, loss: str = "policy", steps: int = 1, **options
) -> tuple[TrainingEngine, dict]:
    trained, metrics = engine(settings, **options), StepMetrics()
    for step in range(1, steps + 1):
        trained.update(samples, LOSSES[loss](settings.algorithm), step, metrics)
    return trained, metrics.reduce(options.get("collectives") or Collectives.single())


def weights(trained: TrainingEngine) -> dict[str, torch.Tensor]:
    return {name: tensor.cpu().clone() for name, tensor in trained.named_weights()}


def padded_policy_loss(model: Decoder, samples: Batch, settings: Config) -> torch.Tensor:
    """The token-mean PPO loss written down sequence by sequence, without packing, weights or micro-batches."""
    total, count = torch.zeros(()), 0
    from siirl.model.decoder import PackedAttention
    from siirl_kernels.packing import PackedSequences

    for i in range(len(samples)):
        if samples.dense("failed")[i]:
            continue
        prompt, response = samples.ragged("prompt_ids").rows()[i], samples.ragged("response_ids").rows()[i]
        tokens = torch.cat((prompt, response))
        sequence = PackedSequences((len(tokens),), torch.device("cpu"))
        logits = model.logits(model(tokens, sequence.positions, PackedAttention(sequence)))
        log_probs = torch.log_softmax(logits[len(prompt) - 1 : -1], -1).gather(1, response[:, None]).squeeze(1)
        ratio = (log_probs - samples.ragged("old_log_probs").rows()[i]).exp()
        advantages = samples.ragged("advantages").rows()[i]
        total = total - torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).sum()
        count += len(response)
    return total / count


def test_the_update_is_the_gradient_of_the_loss_written_down_plainly() -> None:
    settings, samples = config(), batch().drop(["ref_log_probs"])
    model = decoder()
    loss = padded_policy_loss(model, samples, settings)
    loss.backward()
    trained, metrics = update(settings, samples)
    assert metrics["actor/loss"] == pytest.approx(loss.item(), abs=1e-6)
    for name, parameter in model.named_parameters():
        expected = parameter.detach() - 0.5 * parameter.grad
        torch.testing.assert_close(weights(trained)[name], expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("loss_agg", AGGREGATIONS)
@pytest.mark.parametrize("loss", ["policy", "value", "sft"])
def test_micro_batch_size_does_not_change_the_update(loss: str, loss_agg: str) -> None:
    def run(budget: int) -> tuple[dict, dict]:
        settings = config(training__micro_batch_tokens=budget, algorithm__loss_agg=loss_agg, algorithm__kl_coef=0.1)
        model = ValueModel(decoder()) if loss == "value" else decoder()
        trained, metrics = update(settings, batch(), loss, model=model)
        return weights(trained), metrics

    (one, m1), (many, m2) = run(10_000), run(1)
    assert m1 == pytest.approx(m2, rel=1e-4, abs=1e-6)
    for name in one:
        torch.testing.assert_close(many[name], one[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("budget", [1, 24, 10_000])
def test_on_policy_the_ratio_is_exactly_one_for_every_split(budget: int) -> None:
    samples = batch().drop(["old_log_probs", "ref_log_probs"])
    _, metrics = update(config(training__micro_batch_tokens=budget), samples)
    assert metrics["actor/ratio_min"] == metrics["actor/ratio_max"] == 1.0
    assert metrics["actor/clip_fraction"] == 0.0


@pytest.mark.parametrize("budget", [1, 24, 10_000])
@pytest.mark.parametrize("mini_batches", [1, 3])
def test_old_log_probs_are_bit_equal_to_those_of_the_updates_first_pass(budget: int, mini_batches: int) -> None:
    settings = config(training__micro_batch_tokens=budget, training__lr=0.0, algorithm__mini_batches=mini_batches)
    trained = engine(settings)
    samples = batch().drop(["ref_log_probs"])
    old = trained.log_probs(samples, mini_batches)
    metrics = StepMetrics()
    trained.update(samples.with_columns(old_log_probs=old), LOSSES["policy"](settings.algorithm), 1, metrics)
    reduced = metrics.reduce(Collectives.single())
    assert reduced["actor/ratio_min"] == reduced["actor/ratio_max"] == 1.0


def test_a_failed_sample_does_not_move_the_weights() -> None:
    samples = batch()
    advantages = samples.ragged("advantages")
    changed = advantages.values.clone()
    changed[advantages.offsets[4] : advantages.offsets[5]] = 1e6
    loud = samples.with_columns(advantages=type(advantages)(changed, advantages.offsets))
    quiet, _ = update(config(), samples)
    other, _ = update(config(), loud)
    for name, tensor in weights(quiet).items():
        assert torch.equal(tensor, weights(other)[name])


def test_learning_rate_schedules() -> None:
    settings = config(
        training__steps=10, training__lr_warmup_steps=4, training__lr_schedule="linear", training__lr_min_ratio=0.1
    )
    factors = [lr_factor(step, settings.training) for step in range(1, 11)]
    assert factors == pytest.approx([0.25, 0.5, 0.75, 1.0, 0.85, 0.7, 0.55, 0.4, 0.25, 0.1])
    cosine = config(training__steps=5, training__lr_schedule="cosine").training
    assert [lr_factor(step, cosine) for step in (1, 3, 5)] == pytest.approx([1.0, 0.5, 0.0])


def test_bfloat16_computes_near_float32_and_keeps_float32_weights() -> None:
    samples = batch().drop(["old_log_probs", "ref_log_probs"])
    exact = engine(config()).log_probs(samples, 1).values
    trained, _ = update(config(training__dtype="bfloat16"), samples)
    assert all(tensor.dtype == torch.float32 for tensor in weights(trained).values())
    rough = engine(config(training__dtype="bfloat16")).log_probs(samples, 1).values
    assert 0 < (rough - exact).abs().max() < 0.2


def _worker(rank: int, size: int, port: int, sharding: str, rows: list[list[int]], folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    settings = config(training__sharding=sharding, training__micro_batch_tokens=24, algorithm__mini_batches=2)
    backend = device_under_test.backend()
    backend.bind(rank)
    collectives = Collectives.init(backend, rank, size, 60)
    trained, metrics = update(settings, batch().take(rows[rank]), steps=3, collectives=collectives)
    torch.save((weights(trained), metrics), f"{folder}/{rank}.pt")
    collectives.close()


@pytest.mark.parametrize("sharding", ["replicate", "shard"])
@pytest.mark.parametrize(
    "rows",
    [
        [[0, 1, 2, 3, 6, 7], [4, 5, 8, 9, 10, 11]],
        [list(range(12)), []],  # a worker without a row still takes part
        pytest.param([[11, 2, 5], [0, 9, 7, 4], [1, 3, 6, 8, 10]], marks=pytest.mark.long),
    ],
    ids=["even", "one empty", "three"],
)
def test_workers_do_not_change_the_update(sharding: str, rows: list[list[int]], tmp_path) -> None:
    alone, expected = update(config(training__micro_batch_tokens=24, algorithm__mini_batches=2), batch(), steps=3)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_worker, (len(rows), port, sharding, rows, str(tmp_path)), nprocs=len(rows))
    for rank in range(len(rows)):
        own, metrics = torch.load(f"{tmp_path}/{rank}.pt", weights_only=True)
        assert metrics == pytest.approx(expected, rel=1e-4, abs=1e-6)
        for name, tensor in weights(alone).items():
            torch.testing.assert_close(own[name], tensor, atol=1e-5, rtol=1e-5)
