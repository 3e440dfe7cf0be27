"""What a benchmark is measured against does the same work: its results are those of what is measured."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch

from siirl.bench import setting
from siirl.bench.plain import PlainDecoder, PlainTrainer, generate
from siirl.bench.plain_ops import PLAIN
from siirl.bench.suites.databuffer import Redistribution
from siirl.bench.suites.sync_weights import MODEL, Sync
from siirl.bench.world import World
from siirl.dag.plan import TransportName
from siirl.data.batch import Batch
from siirl.device import select
from siirl.device.backend import Backend
from siirl.device.collectives import Collectives
from siirl.model.decoder import PackedAttention
from siirl.rollout.engine import NativeEngine
from siirl.rollout.sampling import Sampling
from siirl.telemetry.accumulator import StepMetrics
from siirl.training.fsdp import TrainingEngine
from siirl.training.losses import policy_update
from siirl_kernels import providers
from siirl_kernels.accuracy import measure
from siirl_kernels.contracts import CONTRACTS, results
from siirl_kernels.packing import PackedSequences


@pytest.fixture
def backend() -> Backend:
    return select("cpu")


def test_every_op_has_a_plain_formula() -> None:
    assert PLAIN.keys() == CONTRACTS.keys()


@pytest.mark.parametrize("op", PLAIN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_plain_formula_is_the_op(op: str, dtype: torch.dtype) -> None:
    contract = CONTRACTS[op]
    for case in [*contract.cases("full", dtype, "cpu"), *contract.cases("perf", dtype, "cpu")]:
        if case.name in ("no row", "no token", "no response", "all empty"):
            continue
        exact = case.to(torch.device("cpu"), torch.float64)
        truth, _ = results(providers(op)["torch"], exact, contract, inference=True)
        for result, expected in zip(results(PLAIN[op], case, contract, inference=True)[0], truth, strict=True):
            # a rounding more or less than a kernel may have: formulas in steps round every step
            tolerance = contract.tolerance(dtype, case, "forward").times(4, 4)
            assert measure(result, expected, tolerance).element_share <= 1, case.name


def test_the_plain_decoder_has_the_decoders_logits(backend: Backend) -> None:
    decoder = setting.decoder(backend)
    tokens = setting.random_tokens(3, 20)
    sequences = PackedSequences((20,) * 3, tokens.device)
    packed = decoder.logits(decoder(tokens.flatten(), sequences.positions, PackedAttention(sequences)))
    torch.testing.assert_close(PlainDecoder(decoder)(tokens).flatten(0, 1), packed, rtol=1e-4, atol=1e-4)


def test_plain_generation_draws_the_engines_tokens(backend: Backend) -> None:
    decoder, prompts = setting.decoder(backend), setting.random_tokens(4, 9)
    engine = NativeEngine(decoder, [setting.END], lambda ids: "")
    sampling = Sampling(12, temperature=0.0, ignore_eos=True)
    drawn = engine.generate(prompts.tolist(), torch.arange(8), sampling, 2, seed=0).response_ids.values.view(8, 12)
    plain = generate(PlainDecoder(decoder), prompts.repeat_interleave(2, 0), 12, forbidden=setting.END, greedy=True)
    assert torch.equal(plain[:, 9:], drawn)


def test_a_plain_update_has_the_engines_loss_and_weights(backend: Backend) -> None:
    config = setting.config(4, 2, 16)
    config.training.lr = 1e-3
    decoder, batch = setting.decoder(backend), setting.responses(4, 2, 8, 16)
    model = PlainDecoder(decoder)
    engine = TrainingEngine(decoder, config.training, backend, Collectives.single(), "actor")
    engine.begin(config, config.training.lr)
    metrics = StepMetrics()
    engine.update(batch, policy_update(config.algorithm), step=1, metrics=metrics)
    trainer, (tokens, lengths) = PlainTrainer(model, 1e-3, Collectives.single()), setting.padded(batch, 8)
    advantages = batch.ragged("advantages")
    loss = trainer.update(
        tokens, 8, lengths, trainer.log_probs(tokens, 8).detach(), advantages.values[advantages.offsets[:-1]]
    )
    assert loss == pytest.approx(metrics.reduce(Collectives.single())["actor/loss"], rel=1e-4)
    for name, weight in decoder.model.named_parameters():
        # AdamW's first step is the learning rate times the gradient's sign, where the gradient is no rounding error
        moved = (model.weights[name] - weight).abs() > 1e-5
        assert moved.float().mean() < 0.01, name


@pytest.mark.parametrize("transport", get_args(TransportName))
def test_gathering_everything_gives_the_databuffers_rows(backend: Backend, transport: TransportName) -> None:
    with World(backend, 2, Redistribution, transport) as world:
        for one, other in zip(world.call("candidate"), world.call("reference"), strict=True):
            assert isinstance(one, Batch)
            assert one.equals(other.take(other.dense("sample_id").argsort()))


class Emptied(Sync):
    """Says whether an engine whose weights were zero has the model's after each way to copy them."""

    def both(self) -> list[bool]:
        return [self._fills(self.candidate), self._fills(self.reference)]

    def _fills(self, work: Any) -> bool:
        for tensor in self.tensors:
            tensor.zero_()
        work()
        expected = setting.decoder(self._backend, MODEL).parameters()
        return all(torch.equal(own, p.to(own.dtype)) for own, p in zip(self.tensors, expected, strict=True))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bare_copies_fill_the_engine_as_a_sync_does(backend: Backend, dtype: str) -> None:
    assert Emptied(backend, Collectives.single(), dtype).both() == [True, True]


def test_bare_gathers_fill_the_engine_as_a_sharded_sync_does(backend: Backend) -> None:
    with World(backend, 2, Emptied, "bfloat16") as world:
        assert world.call("both") == [[True, True]] * 2
