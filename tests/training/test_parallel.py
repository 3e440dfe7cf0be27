"""Tensor, sequence and context parallel training computes what one plain worker does: loss, gradients, weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from siirl.config.schema import ParallelConfig
from siirl.dag.degrees import check_model
from siirl.dag.plan import training_layout
from siirl.device.collectives import Collectives
from siirl.errors import RequestError
from siirl.model.config import DecoderConfig
from siirl.model.critic import ValueModel
from siirl.model.decoder import Decoder
from siirl.telemetry.accumulator import StepMetrics
from siirl.training.exchange import shares
from siirl.training.fsdp import TrainingEngine
from siirl.training.losses import LOSSES
from siirl.training.mesh import Mesh
from siirl.training.ring import RingAttention
from siirl.training.tensor_parallel import vocabulary_argmax, vocabulary_log_prob
from siirl.validation.world import World
from siirl_kernels.packing import PackedSequences
from tests import device_under_test
from tests.training import batches

LR = 0.5
EXPERTS: dict[str, Any] = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "mlp_only_layers": (0,),
}
Case = dict[str, Any]

WORKERS = 4

# degrees that are left out are 1, and data parallel takes the workers that are left
CASES: dict[str, Case] = {
    "tensor 2 x data 2": {"tensor": 2},
    "tensor 2 x data 2, all tokens everywhere": {"tensor": 2, "sequence": False},
    "tensor 2 x data 2, sharded": {"tensor": 2, "sharding": "shard"},
    "tensor 4, biases, odd vocabulary": {"tensor": 4, "model": "biased"},
    "tensor 4, biases, odd vocabulary, all tokens everywhere": {"tensor": 4, "sequence": False, "model": "biased"},
    "tensor 4, critic": {"tensor": 4, "loss": "value"},
    "ulysses 2 x data 2, sharded": {"context": 2, "sharding": "shard"},
    "ulysses 4": {"context": 4},
    "ring 2 x data 2, sharded, critic": {"context": 2, "context_mode": "ring", "sharding": "shard", "loss": "value"},
    "ring 4, a row at a time": {"context": 4, "context_mode": "ring", "budget": 1},  # rows of fewer tokens than workers
    "experts, data 4, sharded": {"sharding": "shard", "model": "experts"},
    "experts, ulysses 2 x data 2": {"context": 2, "model": "experts"},
    "experts, ring 4": {"context": 4, "context_mode": "ring", "model": "experts"},
    "expert 2 x data 4": {"expert": 2, "model": "experts"},
    "expert 4, a row at a time": {"expert": 4, "model": "experts", "budget": 1},
    "expert 2 x data 4, critic": {"expert": 2, "model": "experts", "loss": "value"},
    "tensor 2 x ulysses 2": {"tensor": 2, "context": 2},
    "tensor 2 x ring 2, sharded, biases": {
        "tensor": 2,
        "context": 2,
        "context_mode": "ring",
        "sharding": "shard",
        "model": "biased",
    },
}


def model(kind: str) -> Decoder:
    """``plain``: query and key norms, untied, even vocabulary. ``biased``: every bias, tied, odd vocabulary.

    ``experts``: as plain, a mixture of experts in its second layer.
    """
    biased = kind == "biased"
    config = DecoderConfig(
        family={"biased": "qwen2", "plain": "qwen3", "experts": "qwen3_moe"}[kind],
        vocab_size=51 if biased else 52,
        hidden_size=32,
        intermediate_size=64,
        num_layers=2,
        num_heads=8,
        num_kv_heads=4,
        head_dim=8,
        max_positions=128,
        qkv_bias=biased,
        out_bias=biased,
        mlp_bias=biased,
        qk_norm=not biased,
        tie_embeddings=biased,
        initializer_range=0.2,
        **(EXPERTS if kind == "experts" else {}),
    )
    made, generator = Decoder(config), torch.Generator().manual_seed(5)
    made.initialize(generator)
    with torch.no_grad():  # else norms are all alike, and biases nothing
        for parameter in made.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return made


def train(world: Collectives, case: Case) -> dict[str, Any]:
    """Three updates of a model on this worker's share of the rows."""
    case = {"loss": "policy", "model": "plain", "sharding": "replicate", "budget": 40} | case
    degrees = {key: case[key] for key in ("tensor", "context", "context_mode", "sequence", "expert") if key in case}
    settings = batches.config(
        training__parallel=degrees,
        training__sharding=case["sharding"],
        training__micro_batch_tokens=case["budget"],
        training__max_grad_norm=1.0,
        training__lr=LR,
        training__router_aux_coef=0.1 if case["model"] == "experts" and case["loss"] == "policy" else 0.0,
        algorithm__mini_batches=2,
        algorithm__kl_coef=0.1,
        algorithm__entropy_coef=0.01,
    )
    mesh = Mesh.of(world, training_layout(settings, world.size), world)
    assert mesh is not None
    decoder = model(case["model"])
    trained = ValueModel(decoder) if case["loss"] == "value" else decoder
    engine = TrainingEngine(trained, settings.training, device_under_test.backend(), world, "actor", mesh)
    engine.begin(settings, LR)
    rows = batches.batch().take(torch.arange(mesh.data.rank, 12, mesh.data.size))
    metrics, states = StepMetrics(), []
    for step in (1, 2, 3):
        engine.update(rows, LOSSES[case["loss"]](settings.algorithm), step, metrics)
        states.append({name: tensor.cpu().clone() for name, tensor in engine.named_weights()})
    counted = metrics
    if mesh.copy:
        counted = StepMetrics()
        counted.name(metrics)
    found = {"metrics": counted.reduce(world), "first": states[0], "last": states[-1]}
    if case["loss"] == "policy":
        found["log_probs"] = engine.log_probs(rows, 2).values
        found["rows"] = rows.dense("sample_id")
        found["greedy"] = engine.greedy([[1, 2, 3], [4]], 3)
    assert engine.optimizer is not None
    held = {id(p) for group in engine.optimizer.param_groups for p in group["params"]}
    found["optimised"] = held == {id(p) for p in engine.model.parameters()}  # a checkpoint finds the moments by them
    return found


def attend(world: Collectives, lengths: list[int], parents: list[int], prefixes: list[int]) -> list[Tensor]:
    """A ring's output and gradients, gathered; every worker computes with its part of the same tensors."""
    sequences = PackedSequences(tuple(lengths), torch.device("cpu"), tuple(parents), tuple(prefixes))
    counts = shares(sum(lengths), world.size)
    own = [x.split(counts)[world.rank].detach().requires_grad_() for x in attention_inputs(sum(lengths))]
    out = RingAttention(sequences, counts, world)(0, *own[:3])
    (out * own[3]).sum().backward()
    return [x.detach() for x in (out, *(own[i].grad for i in range(3)))]


def attention_inputs(tokens: int) -> list[Tensor]:
    """Queries of 4 heads, keys and values of 2, and a gradient of the result; head size 8."""
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(tokens, heads, 8, generator=generator) for heads in (4, 2, 2, 4)]


def head(world: Collectives, temperature: float) -> list[Tensor]:
    """Log-probs, entropies, likeliest tokens and gradients with the vocabulary cut."""
    hidden, weight, target, factors = head_inputs()
    own = weight.chunk(world.size)[world.rank].detach().requires_grad_()
    hidden.requires_grad_()
    found = vocabulary_log_prob(hidden, own, target, temperature, world)
    (torch.stack(found) * factors).sum().backward()
    assert hidden.grad is not None and own.grad is not None
    return [
        *(x.detach() for x in found),
        vocabulary_argmax(hidden.detach(), own.detach(), world),
        hidden.grad,
        own.grad,
    ]


def head_inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(9)
    hidden, weight = torch.randn(7, 16, generator=generator), torch.randn(24, 16, generator=generator)
    return hidden, weight, torch.tensor([0, 5, 11, 12, 23, 17, 3]), torch.randn(2, 7, generator=generator)


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    made = World(device_under_test.backend, WORKERS)
    yield made
    made.close()


@pytest.fixture(scope="module")
def alone() -> dict[tuple[str, str], dict[str, Any]]:
    """What one plain worker computes, by loss and model."""
    pairs = [("policy", "plain"), ("policy", "biased"), ("value", "plain"), ("policy", "experts"), ("value", "experts")]
    return {(loss, kind): train(Collectives.single(), {"loss": loss, "model": kind}) for loss, kind in pairs}


@pytest.mark.parametrize("name", CASES)
def test_a_mesh_trains_as_one_worker_does(name: str, world: World, alone: dict) -> None:
    case = CASES[name]
    kind = case.get("model", "plain")
    expected = alone[case.get("loss", "policy"), kind]
    answers = world.run(train, case, deadline_s=120.0)
    start = dict(named_start(case))
    for found in answers:
        assert found["optimised"]
        assert found["metrics"] == pytest.approx(expected["metrics"], rel=2e-4, abs=1e-5)
        for parameter, weight in expected["last"].items():
            torch.testing.assert_close(found["last"][parameter], weight, atol=1e-5, rtol=1e-4, msg=parameter)
            gradient = (start[parameter] - expected["first"][parameter]) / LR  # of the two clipped updates of a step
            own = (start[parameter] - found["first"][parameter]) / LR
            torch.testing.assert_close(own, gradient, atol=2e-6, rtol=1e-3, msg=parameter)
            assert torch.equal(found["last"][parameter], answers[0]["last"][parameter])
    if "log_probs" in expected:
        by_row = dict(zip(expected["rows"].tolist(), responses(expected), strict=True))
        for found in answers:
            for row, values in zip(found["rows"].tolist(), responses(found), strict=True):
                torch.testing.assert_close(values, by_row[row], atol=1e-4, rtol=0)
            assert torch.equal(found["greedy"][0], expected["greedy"][0])


def named_start(case: Case) -> Iterator[tuple[str, Tensor]]:
    decoder = model(case.get("model", "plain"))
    trained = ValueModel(decoder) if case.get("loss") == "value" else decoder
    yield from ((name, parameter.detach()) for name, parameter in trained.named_parameters())


def responses(found: dict[str, Any]) -> tuple[Tensor, ...]:
    lengths = batches.batch().lengths("response_ids")[found["rows"]]
    return found["log_probs"].split(lengths.tolist())


@pytest.mark.parametrize(
    ("lengths", "parents", "prefixes"),
    [
        ([9, 4, 13, 1], [0, 1, 2, 3], [0, 0, 0, 0]),
        ([12, 5, 1, 7, 6], [0, 0, 0, 3, 3], [0, 8, 12, 0, 2]),  # shared prefixes, across the workers' borders
        ([1], [0], [0]),  # fewer tokens than workers
        ([2, 1], [0, 0], [0, 2]),
    ],
)
def test_a_ring_attends_as_the_written_down_softmax(
    lengths: list[int], parents: list[int], prefixes: list[int], world: World
) -> None:
    q, k, v, grad = (x.double().requires_grad_() for x in attention_inputs(sum(lengths)))
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    rows = []
    for i, length in enumerate(lengths):
        shared = list(range(starts[parents[i]], starts[parents[i]] + prefixes[i]))
        for last in range(starts[i], starts[i] + length):
            seen = shared + list(range(starts[i], last + 1))
            keys, values = (x[seen].repeat_interleave(2, 1) for x in (k, v))
            weights = torch.softmax(torch.einsum("nd,snd->ns", q[last], keys) / 8**0.5, -1)
            rows.append(torch.einsum("ns,snd->nd", weights, values))
    out = torch.stack(rows)
    (out * grad.detach()).sum().backward()
    expected = [out.detach(), q.grad, k.grad, v.grad]
    answers = world.run(attend, lengths, parents, prefixes)
    for parts, whole in zip(zip(*answers, strict=True), expected, strict=True):
        assert whole is not None
        torch.testing.assert_close(torch.cat(parts).double(), whole, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_cut_vocabulary_gives_the_log_probs_of_the_whole_one(temperature: float, world: World) -> None:
    hidden, weight, target, factors = head_inputs()
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    log_p = torch.log_softmax(hidden @ weight.t() / temperature, -1)
    expected = torch.stack((log_p.gather(1, target[:, None]).squeeze(1), -(log_p.exp() * log_p).sum(-1)))
    (expected * factors).sum().backward()
    answers = world.run(head, temperature)
    for log_prob, entropy, likeliest, _, _ in answers:
        torch.testing.assert_close(torch.stack((log_prob, entropy)).double(), expected.detach(), atol=1e-5, rtol=1e-5)
        assert torch.equal(likeliest, log_p.argmax(-1))
    assert hidden.grad is not None and weight.grad is not None
    torch.testing.assert_close(sum(a[3] for a in answers).double(), hidden.grad, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.cat([a[4] for a in answers]).double(), weight.grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("degrees", "sentence"),
    [
        ({"tensor": 8}, "tensor is 8, which does not divide the model's 4 key/value heads; set .*tensor=4"),
        ({"tensor": 3}, "tensor is 3, which does not divide the model's 8 attention heads; set .*tensor=2"),
        ({"context": 8}, "context is 8, which does not divide the model's 4 key/value heads; set .*mode=ring"),
        ({"tensor": 2, "context": 4}, "context is 4, which does not divide the 2 key/value heads of a worker; set"),
    ],
)
def test_degrees_that_do_not_divide_the_heads_are_refused(degrees: dict[str, int], sentence: str) -> None:
    with pytest.raises(RequestError, match=sentence):
        check_model(model("plain").config, ParallelConfig(**degrees))


@pytest.mark.parametrize(
    ("kind", "degree", "sentence"),
    [
        ("plain", 2, "expert is 2, but the model has no experts; set training.parallel.expert=1"),
        ("experts", 3, "expert is 3, which does not divide the model's 8 experts; set training.parallel.expert=1"),
        ("experts", 12, "set training.parallel.expert=4"),
    ],
)
def test_expert_groups_that_do_not_suit_the_model_are_refused(kind: str, degree: int, sentence: str) -> None:
    with pytest.raises(RequestError, match=sentence):
        check_model(model(kind).config, ParallelConfig(expert=degree))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"training__parallel": {"expert": 2, "tensor": 2}}, "does not combine it with tensor parallel"),
        ({"training__parallel": {"expert": 2, "context": 2}}, "does not combine it with context parallel"),
        ({"training__parallel": {"expert": 2}, "training__sharding": "shard"}, "are not sharded further"),
        ({"training__parallel": {"expert": 3}}, "does not divide the 4 workers of data parallel; set .*expert=1"),
    ],
)
def test_expert_groups_that_do_not_suit_the_workers_are_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RequestError, match=sentence):
        training_layout(batches.config(**changes), 4)
