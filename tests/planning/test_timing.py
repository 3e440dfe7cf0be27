"""Operations, collectives, generation and traffic: against PyTorch's counter, loops and formulas worked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from siirl.model.decoder import PackedAttention
from siirl.planning.cluster import load_cluster
from siirl.planning.collectives import Group, all_reduce, exchange, reduce_scatter
from siirl.planning.estimate import estimate
from siirl.planning.generation import decode_seconds, iteration_seconds
from siirl.planning.loads import Loads
from siirl.planning.models import find_shape
from siirl.planning.timing import phases
from siirl.planning.traffic import column_bytes, moved_bytes
from siirl.planning.workload import Lengths
from siirl_kernels.packing import PackedSequences
from tests.planning.jobs import job_of
from tests.planning.test_memory import PARAMETERS, decoder, step


@pytest.mark.usefixtures("references")
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_operations_are_those_that_pytorch_counts(architecture: str) -> None:
    path, lengths = f"tiny:{architecture}:128:2:256", [32, 32, 32]
    module = decoder(path)
    sequences = PackedSequences(tuple(lengths), torch.device("cpu"))
    # the counter knows no fused attention of the CPU, and counts the whole square of a causal one
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        hidden = module(torch.arange(96), sequences.positions, PackedAttention(sequences))
        module.logits(hidden[:10])
    assert counter.get_total_flops() == find_shape(path).forward_flops(96, sum(n * n for n in lengths), 10)


def test_a_token_of_qwen2_5_7b_takes_twice_its_active_weights() -> None:
    shape = find_shape("qwen2.5-7b")
    assert shape.forward_flops(1, 0, 1) == pytest.approx(2 * (PARAMETERS - 152_064 * 3584), rel=1e-3)


H200 = load_cluster("h200-128x8")


def test_an_all_reduce_within_a_node_by_hand() -> None:
    seconds = all_reduce(H200, Group(8), 1e9, 1024)
    assert seconds == pytest.approx(2 * (7 / 8 * 1e9 / (450e9 * 0.8) + 3 * 5e-6))


def test_an_all_reduce_over_nodes_by_hand() -> None:
    inside = 7 / 8 * 1e9 / (450e9 * 0.8) + 3 * 5e-6
    between = 127 / 128 * 1e9 / 8 / (50e9 * 0.8) + 7 * 15e-6
    assert all_reduce(H200, Group(1024), 1e9, 1024) == pytest.approx(2 * (inside + between))


def test_ranks_that_are_a_node_apart_use_the_network_only() -> None:
    assert reduce_scatter(H200, Group(4, 8), 1e9, 1024) == pytest.approx(3 / 4 * 1e9 / (50e9 * 0.8) + 2 * 15e-6)


def test_an_exchange_sends_most_bytes_over_the_network_by_hand() -> None:
    near = 7 / 1023
    seconds = near * 1e9 / (450e9 * 0.8) + (1 - near) * 1e9 / (50e9 * 0.8) + 15e-6 * math.log2(5)
    assert exchange(H200, Group(1024), 1e9, 4, 1024) == pytest.approx(seconds)


def test_a_decoding_iteration_reads_weights_and_cache() -> None:
    job = job_of(8)
    few, many = (float(iteration_seconds(job, np.array([b]), np.array([b * 1000.0]))[0]) for b in (1.0, 64.0))
    dispatch = 5e-6 * (40 * 28 + 60)
    read = 2 * (PARAMETERS - 152_064 * 3584)  # the embedding is looked up
    assert few - dispatch == pytest.approx((read + 1000 * 57_344) / (4.8e12 * 0.65))
    assert many - dispatch == pytest.approx((read + 64_000 * 57_344) / (4.8e12 * 0.65))


def decoded_token_by_token(job, lengths: list[int], prompt: float, slots: int) -> float:  # type: ignore[no-untyped-def]
    """The same generation, one iteration after another."""
    waiting, flying, seconds = list(lengths), [], 0.0
    while waiting or flying:
        while waiting and len(flying) < slots:
            flying.append([0, waiting.pop(0)])
        cached = sum(prompt + done + 0.5 for done, _ in flying)
        seconds += float(iteration_seconds(job, np.array([float(len(flying))]), np.array([cached]))[0])
        for sequence in flying:
            sequence[0] += 1
        flying = [sequence for sequence in flying if sequence[0] < sequence[1]]
    return seconds


@pytest.mark.parametrize("slots", [64, 16])
def test_decoding_takes_as_long_as_iteration_by_iteration(slots: int) -> None:
    job = job_of(8, rollout__max_sequences=slots)
    lengths = np.random.default_rng(0).integers(1, 300, (2, 40))
    expected = [decoded_token_by_token(job, row.tolist(), 100.0, slots) for row in lengths]
    assert decode_seconds(job, lengths, 100.0) == pytest.approx(expected, rel=1e-3)


def test_columns_travel_as_wide_as_their_values_need() -> None:
    job = job_of(8, lengths=Lengths(500.0, 400.0, 0.0, 1024))
    assert column_bytes(job, "prompt_ids") == 500 * 4  # 152,064 ids need more than two bytes
    assert column_bytes(job, "prompt_ids", narrow=False) == 500 * 8
    assert column_bytes(job, "rollout_log_probs") == 400 * 4
    small = job_of(2, "local-2", model__path="tiny:qwen3:64:2:128", lengths=Lengths(500.0, 400.0, 0.0, 1024))
    assert column_bytes(small, "response_ids") == 400


def test_equal_rows_stay_and_each_mini_batch_gathers_from_its_half_of_the_workers() -> None:
    """Mini-batches are stretches of the step's order, as the workers' prompts are: of two, each worker has one."""
    equal = Lengths(500.0, 400.0, 0.0, 1024)
    one = moved_bytes(job := job_of(8, lengths=equal), step(job, "redistribute"))
    assert (one.kept, one.total) == (1.0, 0.0)
    job = job_of(8, lengths=equal, algorithm__mini_batches=2)
    two = moved_bytes(job, step(job, "redistribute"))
    assert two.kept == pytest.approx(0.5)
    assert two.total == pytest.approx(0.5 * two.row * 512 * 8)


def test_tokens_are_narrowed_only_where_rows_leave_their_host() -> None:
    lengths = Lengths(500.0, 400.0, 0.0, 1024)
    inside, across = (job_of(workers, lengths=lengths) for workers in (8, 16))
    rows = [moved_bytes(job, step(job, "redistribute")).row for job in (inside, across)]
    assert rows[0] - rows[1] == (500 + 400) * (8 - 4)


def test_unequal_rows_mostly_stay() -> None:
    job = job_of(64)
    assert moved_bytes(job, step(job, "redistribute")).kept > 0.9


def test_an_update_of_qwen2_5_7b_by_hand() -> None:
    """Eight workers, each with one group of eight whose prompt is computed once; sums over all workers follow."""
    job = job_of(8, lengths=Lengths(512.0, 256.0, 0.0, 256), data__prompts_per_step=8, rollout__max_new_tokens=256)
    (phase,) = phases(job, step(job, "update"), Loads.of(job.rows()))
    shape = find_shape("qwen2.5-7b")
    tokens, predicted = 512 + 8 * 256, 8 * 256
    pairs = 512 * 513 / 2 + 8 * (256 * 512 + 256 * 257 / 2)
    layers = 2 * shape.active_matrices * tokens + 4 * 28 * 28 * 128 * pairs
    flops = 3 * layers + 4 * 2 * 152_064 * 3584 * predicted
    dispatch, python = 3 * 5e-6 * 40 * 28, 1e-3
    assert phase.seconds == pytest.approx(np.full(8, flops / (989.5e12 * 0.4) + dispatch + python))
    gradients = all_reduce(job.cluster, Group(8), 4.0 * PARAMETERS, 8)
    assert phase.together == pytest.approx(gradients + 28 * PARAMETERS / (4.8e12 * 0.65))


def test_a_step_is_the_sum_of_its_parts_by_how_often_they_run() -> None:
    found = estimate(job_of(8))
    assert found.seconds == pytest.approx(sum(s.seconds * s.share for s in found.steps))
    assert {s.id: s.share for s in found.steps}["samples"] == pytest.approx(0.1)


def test_the_mean_response_is_that_of_the_drawn_ones() -> None:
    lengths = Lengths(100.0, 300.0, 0.8, 512)
    drawn = lengths.draw(200_000, 0)
    assert drawn.max() == 512
    assert lengths.mean_response == pytest.approx(drawn.mean(), rel=0.01)
