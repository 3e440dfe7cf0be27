from __future__ import annotations

import math
import multiprocessing
import os
import socket
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

from siirl.algorithms import get_advantage
from siirl.algorithms.masking import global_mean, masked_whiten
from siirl.config.schema import AlgorithmConfig
from siirl.data.batch import Batch, Ragged, offsets_of
from siirl.device import select
from siirl.device.collectives import Collectives

SINGLE = Collectives.single()
# What rank 0 and rank 1 hold of twelve rows; in the last two splits one of them holds nothing.
SPLITS = [list(range(6)), [0, 3, 4, 5, 7, 8, 9, 10, 11], list(range(12)), []]


def test_whitening_by_hand():
    # 1, 2, 6 have mean 3 and unbiased variance 7; what is masked may be anything and becomes 0.
    x, mask = torch.tensor([1.0, math.nan, 2.0, 6.0, 50.0]), torch.tensor([True, False, True, True, False])
    expected = torch.tensor([-2.0, 0.0, -1.0, 3.0, 0.0]) / 7**0.5
    torch.testing.assert_close(masked_whiten(x, mask, SINGLE), expected)
    assert global_mean(x, mask, SINGLE) == (3.0, 3)


def test_whitening_keeps_a_small_spread_on_a_large_mean():
    x = torch.tensor([10_000.0, 10_000.25, 10_000.5])  # the square of the mean leaves float32 nothing of the spread
    torch.testing.assert_close(masked_whiten(x, x > 0, SINGLE), torch.tensor([-1.0, 0.0, 1.0]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("values", [[], [3.0], [0.1, 0.1, 0.1]])
def test_nothing_one_element_and_equal_elements_become_zero(values):
    x = torch.tensor(values)
    assert torch.equal(masked_whiten(x, torch.ones(len(x), dtype=torch.bool), SINGLE), torch.zeros(len(x)))


def test_the_mean_of_nothing_is_zero_of_none():
    assert global_mean(torch.tensor([math.nan]), torch.tensor([False]), SINGLE) == (0.0, 0)


def ppo_batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    offsets = offsets_of(torch.randint(0, 9, (12,), generator=generator))
    values = 3.0 + torch.randn(int(offsets[-1]), generator=generator)
    failed = torch.rand(12, generator=generator) > 0.7
    reward = torch.where(failed, math.nan, torch.randn(12, generator=generator))
    response_ids = Ragged(torch.zeros(int(offsets[-1]), dtype=torch.int64), offsets)
    columns = {"response_ids": response_ids, "values": Ragged(values, offsets), "reward": reward, "failed": failed}
    return Batch({**columns, "group_id": torch.arange(12) // 3})


def whitened(batch: Batch, collectives: Collectives) -> list[list[float]]:
    config = AlgorithmConfig(gamma=0.99, lam=0.95, whiten_advantages=True)
    advantages = get_advantage("gae")(batch, config, collectives)["advantages"]
    return [row.tolist() for row in advantages.rows()]


def work_of(rank: int, port: int) -> list[list[list[float]]]:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    collectives = Collectives.init(select("cpu"), rank, 2, timeout_s=60.0)
    mine = [sorted(set(range(12)) - set(rows)) if rank else rows for rows in SPLITS]
    results = [whitened(ppo_batch().take(rows), collectives) for rows in mine]
    collectives.close()
    return results


def test_two_workers_get_the_numbers_of_one_however_rows_are_split():
    expected = whitened(ppo_batch(), SINGLE)
    flat = torch.tensor([x for row in expected for x in row if x != 0.0])
    assert abs(flat.mean()) < 1e-6
    assert flat.std().item() == pytest.approx(1.0)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        results = [task.result(timeout=120) for task in [pool.submit(work_of, rank, port) for rank in (0, 1)]]
    for rows, first, second in zip(SPLITS, *results, strict=True):
        order = rows + sorted(set(range(12)) - set(rows))
        assert len(order) == len(first) + len(second)
        for row, actual in zip(order, first + second, strict=True):
            assert actual == pytest.approx(expected[row], rel=1e-6, abs=1e-7)
