from __future__ import annotations

import math

import pytest
import torch

from siirl.algorithms.rewards_kl import kl_token_rewards
from siirl.data.batch import Ragged


def ragged(*rows: list[float]) -> Ragged:
    return Ragged.from_lists(list(rows), torch.float32)


def test_the_penalised_reward_by_hand():
    # r(x, y) - β·log(π/ρ) per token, the reward at the last (arXiv 1909.08593, equation 2).
    old, ref = ragged([-1.0, -2.0], [-1.0]), ragged([-1.5, -1.0], [-3.0])
    reward, failed = torch.tensor([1.0, -1.0]), torch.tensor([False, False])
    token_rewards, kl = kl_token_rewards(reward, failed, old, ref, coef=0.5, estimator="k1")
    assert [row.tolist() for row in token_rewards.rows()] == [[-0.25, 1.5], [-2.0]]
    assert kl.tolist() == [-0.5, 2.0]


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_sum_over_tokens_is_the_reward_less_the_weighted_kl(estimator):
    generator = torch.Generator().manual_seed(0)
    offsets = torch.tensor([0, 3, 4, 9])
    old, ref = (Ragged(x, offsets) for x in torch.randn(2, 9, generator=generator))
    reward = torch.randn(3, generator=generator)
    token_rewards, kl = kl_token_rewards(reward, torch.zeros(3, dtype=torch.bool), old, ref, 0.1, estimator)
    sums = torch.stack([row.sum() for row in token_rewards.rows()])
    torch.testing.assert_close(sums, reward - 0.1 * kl)


def test_failed_rows_are_zero_and_empty_responses_do_no_harm():
    old, ref = ragged([], [math.nan, -1.0], [-1.0], []), ragged([], [-1.0, -1.0], [-2.0], [])
    reward, failed = torch.tensor([3.0, math.nan, 1.0, 2.0]), torch.tensor([False, True, False, True])
    token_rewards, kl = kl_token_rewards(reward, failed, old, ref, coef=0.25, estimator="k1")
    assert [row.tolist() for row in token_rewards.rows()] == [[], [0.0, 0.0], [0.75], []]
    assert kl.tolist() == [0.0, 0.0, 1.0, 0.0]


def test_no_rows():
    nothing = Ragged(torch.zeros(0), torch.zeros(1, dtype=torch.int64))
    token_rewards, kl = kl_token_rewards(torch.zeros(0), torch.zeros(0).bool(), nothing, nothing, 0.1, "k3")
    assert len(token_rewards) == 0
    assert kl.shape == (0,)
