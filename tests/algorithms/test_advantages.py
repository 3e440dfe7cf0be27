from __future__ import annotations

import math

import pytest
import torch

from siirl.algorithms import get_advantage
from siirl.algorithms.advantages import group_advantages, last_token_rewards
from siirl.config.schema import AlgorithmConfig
from siirl.data.batch import Batch, Ragged, offsets_of
from siirl.device.collectives import Collectives
from siirl_kernels.algorithms import gae


def ragged(*rows: list[float]) -> Ragged:
    return Ragged.from_lists(list(rows), torch.float32)


def random_lengths(seed: int, rows: int = 9, longest: int = 12) -> torch.Tensor:
    return torch.randint(0, longest + 1, (rows,), generator=torch.Generator().manual_seed(seed))


# Groups


def all_valid(n: int) -> torch.Tensor:
    return torch.ones(n, dtype=torch.bool)


def test_grpo_formula_by_hand():
    # Group 7: mean 1/2, unbiased variance 4·(1/4)/3. Group 3: rewards 1, 2, 6: mean 3, variance (4 + 1 + 9)/2.
    reward = torch.tensor([1.0, 1.0, 0.0, 2.0, 0.0, 6.0, 1.0])
    group = torch.tensor([7, 3, 7, 3, 7, 3, 7])
    expected = [0.5 * 3**0.5, -2 / 7**0.5, -0.5 * 3**0.5, -1 / 7**0.5, -0.5 * 3**0.5, 3 / 7**0.5, 0.5 * 3**0.5]
    actual = group_advantages(reward, group, all_valid(7), norm_std=True)
    torch.testing.assert_close(actual, torch.tensor(expected), rtol=1e-5, atol=0)


def test_without_std_it_is_the_centred_reward():
    generator = torch.Generator().manual_seed(0)
    reward, group = torch.randn(40, generator=generator), torch.arange(40) % 5
    centred = reward.reshape(8, 5) - reward.reshape(8, 5).mean(0)
    actual = group_advantages(reward, group, all_valid(40), norm_std=False)
    torch.testing.assert_close(actual, centred.reshape(-1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("norm_std", [True, False])
def test_rows_may_come_in_any_order_and_groups_are_independent(norm_std):
    generator = torch.Generator().manual_seed(1)
    reward = torch.randn(30, generator=generator)
    group = torch.randint(-3, 3, (30,), generator=generator) * 2**60  # ids are any 64-bit numbers
    valid = torch.rand(30, generator=generator) > 0.2
    expected = group_advantages(reward, group, valid, norm_std)
    order = torch.randperm(30, generator=generator)
    torch.testing.assert_close(group_advantages(reward[order], group[order], valid[order], norm_std), expected[order])
    ours = group == group[0]
    torch.testing.assert_close(group_advantages(reward[ours], group[ours], valid[ours], norm_std), expected[ours])


@pytest.mark.parametrize("norm_std", [True, False])
def test_failed_rows_are_as_if_absent(norm_std):
    reward = torch.tensor([1.0, math.nan, 0.0, 5.0, 1.0])
    group, valid = torch.zeros(5, dtype=torch.int64), torch.tensor([True, False, True, False, True])
    actual = group_advantages(reward, group, valid, norm_std)
    expected = group_advantages(reward[valid], group[valid], all_valid(3), norm_std)
    assert torch.equal(actual[valid], expected)
    assert torch.equal(actual[~valid], torch.zeros(2))


@pytest.mark.parametrize("reward", [0.1, 1 / 3, -7.7, 0.0])
def test_equal_rewards_give_exactly_zero(reward):
    # The float32 mean of three times 0.1 is not 0.1; over eps that error would be an advantage.
    for n in (1, 2, 3, 5, 7, 8):
        actual = group_advantages(torch.full((n,), reward), torch.zeros(n, dtype=torch.int64), all_valid(n), True)
        assert torch.equal(actual, torch.zeros(n))


def test_no_rows_and_no_valid_rows():
    empty = torch.zeros(0)
    assert group_advantages(empty, empty.long(), empty.bool(), True).shape == (0,)
    nan = torch.full((3,), math.nan)
    assert torch.equal(group_advantages(nan, torch.tensor([1, 1, 2]), nan.isfinite(), True), torch.zeros(3))


# GAE


def naive_gae(rewards: torch.Tensor, values: torch.Tensor, offsets: torch.Tensor, gamma: float, lam: float):
    """The double loop over responses and tokens, float32 operation by operation."""
    advantages, bounds = torch.zeros_like(values), offsets.tolist()
    for start, end in zip(bounds, bounds[1:], strict=False):
        advantage = next_value = torch.tensor(0.0)
        for t in reversed(range(start, end)):
            advantage = (rewards[t] + gamma * next_value - values[t]) + gamma * lam * advantage
            advantages[t], next_value = advantage, values[t]
    return advantages, advantages + values


def random_gae_case(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    offsets = offsets_of(random_lengths(seed))
    return *torch.randn(2, int(offsets[-1]), generator=generator), offsets


def test_gae_by_hand():
    # γ = 0.9, λ = 0.8. δ = (0.9·0.6 - 0.5, 0.9·0.7 - 0.6, 1 - 0.7) = (0.04, 0.03, 0.3); A_t = δ_t + 0.72·A_{t+1}.
    advantages, returns = gae(
        torch.tensor([0.0, 0.0, 1.0, 2.0]), torch.tensor([0.5, 0.6, 0.7, 0.5]), torch.tensor([0, 3, 3, 4]), 0.9, 0.8
    )
    expected = torch.tensor([0.04 + 0.72 * 0.246, 0.03 + 0.72 * 0.3, 0.3, 1.5])
    torch.testing.assert_close(advantages, expected)
    torch.testing.assert_close(returns, expected + torch.tensor([0.5, 0.6, 0.7, 0.5]))


@pytest.mark.parametrize("seed", range(8))
def test_gae_equals_the_double_loop_to_the_bit(seed):
    rewards, values, offsets = random_gae_case(seed)
    for actual, expected in zip(
        gae(rewards, values, offsets, 0.97, 0.9), naive_gae(rewards, values, offsets, 0.97, 0.9), strict=True
    ):
        assert torch.equal(actual, expected)


def test_gae_of_a_response_does_not_depend_on_its_neighbours():
    rewards, values, offsets = random_gae_case(3)
    together = Ragged(gae(rewards, values, offsets, 0.99, 0.95)[0], offsets).rows()
    for r, v, expected in zip(Ragged(rewards, offsets).rows(), Ragged(values, offsets).rows(), together, strict=True):
        assert torch.equal(gae(r, v, torch.tensor([0, len(r)]), 0.99, 0.95)[0], expected)


def test_gae_with_lambda_one_is_the_discounted_sum_of_rewards_less_the_value():
    rewards, values, offsets = random_gae_case(4)
    for gamma in (1.0, 0.9):
        advantages, returns = gae(rewards, values, offsets, gamma, 1.0)
        bounds = offsets.tolist()
        sums = [
            sum(gamma ** (k - t) * rewards[k].item() for k in range(t, end))
            for start, end in zip(bounds, bounds[1:], strict=False)
            for t in range(start, end)
        ]
        torch.testing.assert_close(advantages, torch.tensor(sums) - values, rtol=0, atol=1e-5)
        torch.testing.assert_close(returns, torch.tensor(sums), rtol=0, atol=1e-5)


def test_gae_with_lambda_zero_is_the_temporal_difference_error():
    rewards, values, offsets = random_gae_case(5)
    rows = zip(Ragged(rewards, offsets).rows(), Ragged(values, offsets).rows(), strict=True)
    errors = [r + 0.9 * torch.cat([v[1:], torch.zeros(min(len(v), 1))]) - v for r, v in rows]
    torch.testing.assert_close(gae(rewards, values, offsets, 0.9, 0.0)[0], torch.cat(errors))


@pytest.mark.parametrize("offsets", [[0], [0, 0], [0, 0, 0]])
def test_gae_of_nothing(offsets):
    advantages, returns = gae(torch.zeros(0), torch.zeros(0), torch.tensor(offsets), 1.0, 1.0)
    assert advantages.shape == returns.shape == (0,)


def test_the_reward_falls_to_the_last_token():
    actual = last_token_rewards(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0, 0, 2, 3, 3]))
    assert actual.tolist() == [0.0, 2.0, 3.0]


# Registered estimators


def responses(*lengths: int) -> Ragged:
    return Ragged.from_lists([list(range(n)) for n in lengths], torch.int64)


def grpo_batch() -> Batch:
    return Batch(
        {
            "response_ids": responses(2, 0, 3, 1),
            "group_id": torch.tensor([5, 9, 5, 5]),
            "reward": torch.tensor([1.0, 1.0, math.nan, 0.0]),
            "failed": torch.tensor([False, False, True, False]),
        }
    )


def test_grpo_gives_every_token_of_a_response_its_advantage():
    config = AlgorithmConfig(norm_adv_by_std=False)
    advantages = get_advantage("grpo")(grpo_batch(), config, Collectives.single())["advantages"]
    assert [row.tolist() for row in advantages.rows()] == [[0.5, 0.5], [], [0.0, 0.0, 0.0], [-0.5]]
    assert advantages.dtype == torch.float32


def test_grpo_obeys_norm_adv_by_std_and_whitening():
    advantages = get_advantage("grpo")(grpo_batch(), AlgorithmConfig(), Collectives.single())["advantages"]
    torch.testing.assert_close(advantages.rows()[3], torch.tensor([-(0.5**0.5)]))  # std of {1, 0} is 1/√2
    config = AlgorithmConfig(whiten_advantages=True)
    whitened = get_advantage("grpo")(grpo_batch(), config, Collectives.single())["advantages"]
    # Valid tokens a, a, -a: mean a/3, unbiased variance 4a²/3.
    a = (2 / 3) / (4 / 3) ** 0.5
    expected = torch.tensor([a, a, 0.0, 0.0, 0.0, -2 * a])
    torch.testing.assert_close(whitened.values, expected)


def ppo_batch() -> Batch:
    return Batch(
        {
            "response_ids": responses(2, 1, 2, 0),
            "values": ragged([0.5, 0.25], [0.5], [math.nan, 1.0], []),
            "reward": torch.tensor([1.0, 2.0, math.nan, 1.0]),
            "failed": torch.tensor([False, False, True, False]),
        }
    )


def test_gae_estimator_puts_the_reward_at_the_last_token_and_zeros_where_it_failed():
    columns = get_advantage("gae")(ppo_batch(), AlgorithmConfig(), Collectives.single())
    assert [row.tolist() for row in columns["returns"].rows()] == [[1.0, 1.0], [2.0], [0.0, 0.0], []]
    assert [row.tolist() for row in columns["advantages"].rows()] == [[0.5, 0.75], [1.5], [0.0, 0.0], []]


def test_gae_estimator_prefers_token_rewards_and_uses_gamma_and_lambda():
    batch = ppo_batch().with_columns(token_rewards=ragged([2.0, 4.0], [0.0], [math.nan, 0.0], []))
    columns = get_advantage("gae")(batch, AlgorithmConfig(gamma=0.5, lam=0.5), Collectives.single())
    # δ = 2 + 0.125 - 0.5, 4 - 0.25; A_0 = 1.625 + 0.25·3.75.
    assert columns["advantages"].rows()[0].tolist() == [2.5625, 3.75]
    assert columns["returns"].rows()[0].tolist() == [3.0625, 4.0]


def test_gae_estimator_whitens_advantages_over_valid_tokens_and_leaves_returns():
    config = AlgorithmConfig(whiten_advantages=True)
    columns = get_advantage("gae")(ppo_batch(), config, Collectives.single())
    advantages = columns["advantages"].values
    # 0.5, 0.75, 1.5: mean 11/12, deviations -5/12, -2/12, 7/12, unbiased variance (25 + 4 + 49)/288.
    expected = torch.tensor([-5.0, -2.0, 7.0]) / 12 / (78 / 288) ** 0.5
    torch.testing.assert_close(advantages[:3], expected)
    assert advantages[3:].tolist() == [0.0, 0.0]
    assert columns["returns"].values.tolist() == [1.0, 1.0, 2.0, 0.0, 0.0]
