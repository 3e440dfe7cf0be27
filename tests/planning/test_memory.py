"""Memory, term by term: against what modules, optimisers and caches hold, and against formulas worked by hand."""

from __future__ import annotations

import math
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from siirl.config.schema import LoRAConfig, TrainingConfig
from siirl.dag import Step
from siirl.model.decoder import Decoder, PackedAttention
from siirl.model.families import tiny_config
from siirl.model.lora import adapt, begin_adapters
from siirl.model.paths import check_path
from siirl.model.recompute import Selective, recompute_layers, selective
from siirl.planning.job import Job
from siirl.planning.memory import cache_rows, memory_of
from siirl.planning.models import find_shape
from siirl.planning.shape import Numbers, Recompute
from siirl.rollout.state import cache_shape
from siirl.training.optimizer import make_optimizer
from siirl_kernels.packing import PackedSequences
from tests.planning.jobs import job_of

PARAMETERS = 7_615_616_512  # of Qwen2.5-7B
LAYER = 233_057_792  # H(2N + 2K)D + (N + 2K)D + 3HI + 2H with H 3584, N 28, K 4, D 128, I 18944
EMBEDDING = 152_064 * 3584


def decoder(path: str) -> Decoder:
    tiny = check_path(path).tiny
    assert tiny
    module = Decoder(tiny_config(tiny, 0.02))
    module.initialize(torch.Generator().manual_seed(0))
    return module


def step(job: Job, op: str) -> Step:
    return next(s for s in job.steps if op in (s.op, s.kind))


def kept_for_backward(module: Decoder, lengths: list[int], patch: pytest.MonkeyPatch, mode: Recompute = "none") -> int:
    """Bytes of the tensors that a forward pass saves, weights and what is computed once left out."""
    weights = {p.untyped_storage().data_ptr() for p in module.parameters()}
    rows: dict[int, int] = {}
    alive: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            rows[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    def pack_selected(self: Selective, tensor: Tensor) -> object:
        packed = own_pack(self, tensor)
        return pack(packed) if isinstance(packed, Tensor) else packed

    own_pack = Selective.pack
    patch.setattr(Selective, "pack", pack_selected)
    if mode == "full":
        recompute_layers(module)
    sequences = PackedSequences(tuple(lengths), torch.device("cpu"))
    tokens = torch.arange(sum(lengths)) % 99
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        selective() if mode == "selective" else nullcontext(),
    ):
        module(tokens, sequences.positions, PackedAttention(sequences))
    return sum(rows.values())


@pytest.mark.usefixtures("references")
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "qwen3_moe"])
@pytest.mark.parametrize("numbers", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_a_layer_keeps_what_the_formula_says(
    architecture: str, numbers: Numbers, mode: Recompute, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = [64] * 5
    kept = []
    for layers in (1, 2):
        module = decoder(f"tiny:{architecture}:128:{layers}:128")
        if numbers == "bfloat16":
            module.bfloat16()
        kept.append(kept_for_backward(module, lengths, monkeypatch, mode))
    shape = find_shape(f"tiny:{architecture}:128:1:128")
    assert kept[1] - kept[0] == shape.saved_bytes(numbers, mode) * sum(lengths)


def test_weights_gradients_and_optimiser_states_are_those_of_a_trained_module() -> None:
    path = "tiny:qwen3:64:2:128"
    module = decoder(path)
    optimizer = make_optimizer(module, TrainingConfig(), 1e-3)
    sequences = PackedSequences((9,), torch.device("cpu"))
    module(torch.arange(9), sequences.positions, PackedAttention(sequences)).sum().backward()
    optimizer.step()
    states = [t for state in optimizer.state.values() for t in state.values() if t.dim()]
    job = job_of(1, "local-2", model__path=path, training__dtype="float32")
    terms = memory_of(job, step(job, "update"))
    assert terms["weights"] == sum(p.nbytes for p in module.parameters())
    assert terms["gradients"] == sum(p.grad.nbytes for p in module.parameters() if p.grad is not None)
    assert terms["optimiser"] == sum(t.nbytes for t in states)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_adapters_alone_have_gradients_and_optimiser_states(architecture: str) -> None:
    path, lora = (
        f"tiny:{architecture}:64:2:128",
        LoRAConfig(rank=3, targets=["q_proj", "v_proj", "o_proj", "down_proj"]),
    )
    module = decoder(path)
    adapt(module, lora, seed=0)
    begin_adapters(module, trained=True, adapters=True)
    optimizer = make_optimizer(module, TrainingConfig(), 1e-3)
    sequences = PackedSequences((9,), torch.device("cpu"))
    module(torch.arange(9), sequences.positions, PackedAttention(sequences)).sum().backward()
    optimizer.step()
    states = [t for state in optimizer.state.values() for t in state.values() if t.dim()]
    job = job_of(
        1,
        "local-2",
        model__path=path,
        training__dtype="float32",
        algorithm__kl_coef=0.1,
        model__lora__rank=3,
        model__lora__targets=lora.targets,
    )
    terms = memory_of(job, step(job, "update"))
    assert "reference" in job.models
    assert terms["weights"] == sum(p.nbytes for p in module.parameters())  # no second model for the reference
    assert terms["gradients"] == sum(p.grad.nbytes for p in module.parameters() if p.grad is not None)
    assert terms["optimiser"] == sum(t.nbytes for t in states)
    assert terms["rollout"] == 4 * job.actor.parameters  # merged


def test_the_cache_is_the_one_the_engine_allocates() -> None:
    path = "tiny:qwen3:64:2:128"
    job = job_of(2, "local-2", model__path=path, training__dtype="float32", rollout__max_sequences=20)
    rows, blocks = cache_rows(job)
    assert (rows, blocks) == (20, 20 * ((1024 + 1024) // 16 + 1))
    model = decoder(path)
    assert memory_of(job, step(job, "rollout"))["kv cache"] == 4 * math.prod(cache_shape(model.config, blocks))


def test_replicated_training_by_hand() -> None:
    job = job_of(8, training__dtype="float32")
    terms = memory_of(job, step(job, "update"))
    assert terms["weights"] == 4 * PARAMETERS
    assert terms["gradients"] == 4 * PARAMETERS + 4 * 64 * 2**20  # and one bucket on its way
    assert terms["optimiser"] == (8 + 4) * PARAMETERS  # two moments, and AdamW's intermediate
    assert "rollout" not in terms  # generation computes with the same tensors


def test_sharded_training_by_hand() -> None:
    job = job_of(64, training__sharding="shard")
    terms = memory_of(job, step(job, "update"))
    gathered = 2 * (2 * EMBEDDING + 3584 + 2 * LAYER)  # embedding, head, last norm and two layers in bfloat16
    assert terms["weights"] == pytest.approx(4 * PARAMETERS / 64 + gathered)
    assert terms["optimiser"] == pytest.approx((8 + 4) * PARAMETERS / 64)
    assert "rollout" not in terms  # its copy of the weights sleeps
    assert memory_of(job, step(job, "rollout"))["rollout"] == 2 * PARAMETERS
    # 64 samples of about 1,000 tokens make several micro-batches: gradients wait whole in between
    assert terms["gradients"] == pytest.approx(4 * PARAMETERS + 4 * PARAMETERS / 64)
    single = job_of(512, training__sharding="shard", training__micro_batch_tokens=65536)
    assert memory_of(single, step(single, "update"))["gradients"] == pytest.approx(4 * 2 * LAYER + 4 * PARAMETERS / 512)


@pytest.mark.parametrize("data", [1, 8, 64])
def test_the_distributed_optimiser_takes_6_and_12_over_d_bytes_a_parameter(data: int) -> None:
    """Megatron Core's developer guide, "Distributed Optimizer": bf16 parameters, fp32 gradients."""
    job = job_of(data, training__engine="megatron")
    terms = memory_of(job, step(job, "update"))
    whole = terms["weights"] + terms["gradients"] + terms["optimiser"]
    assert whole == pytest.approx((6 + 12 / data) * PARAMETERS)


def test_tensor_and_pipeline_parallelism_cut_the_model() -> None:
    job = job_of(64, training__engine="megatron", training__parallel__tensor=4, training__parallel__pipeline=2)
    # the fullest stage: half of the layers and the embedding, or the head; a quarter of each
    assert memory_of(job, step(job, "data"))["weights"] == pytest.approx(2 * (14 * LAYER + EMBEDDING) / 4, rel=1e-6)


def test_experts_are_spread_by_expert_parallelism() -> None:
    values = {"model__path": "qwen3-30b-a3b", "training__engine": "megatron"}
    one = memory_of(job := job_of(64, **values), step(job, "data"))["weights"]
    eight = memory_of(job := job_of(64, **values, training__parallel__expert=8), step(job, "data"))["weights"]
    assert one - eight == pytest.approx(2 * 48 * 3 * 128 * 2048 * 768 * 7 / 8)


def test_the_built_in_engine_holds_its_part_of_the_experts() -> None:
    values = {"model__path": "tiny:qwen3_moe:64:2:128"}
    one = memory_of(job := job_of(8, **values), step(job, "update"))
    four = memory_of(job := job_of(8, **values, training__parallel__expert=4), step(job, "update"))
    elsewhere = 2 * 3 * 8 * 64 * 96 * 3 / 4  # of layers, matrices, experts of 64 x 96: three quarters
    assert one["weights"] - four["weights"] == (4 + 2) * elsewhere  # and copies for bfloat16 products
    assert one["gradients"] > four["gradients"]
    resident = [memory_of(job, step(job, "data")) for job in (job_of(8, **values), job)]
    assert resident[0]["weights"] - resident[1]["weights"] == 4 * elsewhere
    assert resident[0]["optimiser"] - resident[1]["optimiser"] == 8 * elsewhere


def test_activations_shrink_with_what_shares_a_micro_batch() -> None:
    values = {"training__engine": "megatron"}
    whole = memory_of(job := job_of(64, **values), step(job, "update"))["activations"]
    for degrees in ({"tensor": 4}, {"context": 4}, {"tensor": 2, "context": 2}):
        keys = {f"training__parallel__{name}": degree for name, degree in degrees.items()}
        part = memory_of(job := job_of(64, **values, **keys), step(job, "update"))["activations"]
        assert part == pytest.approx(whole / 4)
