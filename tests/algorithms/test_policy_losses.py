from __future__ import annotations

import pytest
import torch

from siirl.algorithms import get_policy_loss
from siirl.algorithms.policy_losses import PolicyLossInput, ppo_clip
from siirl.config.schema import AlgorithmConfig


def inputs(log_probs: torch.Tensor, old: torch.Tensor, advantages: torch.Tensor) -> PolicyLossInput:
    return PolicyLossInput(log_probs, old, advantages, torch.tensor([0, len(log_probs)]))


def of_ratios(ratios: list[float], advantages: list[float]) -> PolicyLossInput:
    log_ratios = torch.tensor(ratios).log()
    return inputs(log_ratios - 1.0, torch.full_like(log_ratios, -1.0), torch.tensor(advantages))


def random_inputs(seed: int, n: int = 200) -> PolicyLossInput:
    generator = torch.Generator().manual_seed(seed)
    return inputs(*torch.randn(3, n, generator=generator, dtype=torch.float64))


def test_the_clipped_surrogate_by_hand():
    # min(rA, clip(r, 0.8, 1.3)A), equation 7 of arXiv 1707.06347, for both signs below, in and above the range.
    config = AlgorithmConfig(clip_low=0.2, clip_high=0.3)
    loss, stats = ppo_clip(of_ratios([0.5, 1.1, 2.0, 0.5, 1.1, 2.0], [1.0, 1.0, 1.0, -1.0, -1.0, -1.0]), config)
    torch.testing.assert_close(loss, torch.tensor([-0.5, -1.1, -1.3, 0.8, 1.1, 2.0]))
    assert stats["clipped"].tolist() == [0, 0, 1, 1, 0, 0]
    torch.testing.assert_close(stats["ratio"], torch.tensor([0.5, 1.1, 2.0, 0.5, 1.1, 2.0]))
    torch.testing.assert_close(stats["kl_old"], -stats["ratio"].log(), rtol=1e-5, atol=1e-6)
    assert "dual_clipped" not in stats


def test_dual_clip_by_hand():
    # max(min(rA, clip(r)A), cA) for A < 0, arXiv 1912.09729, c = 3; positive advantages are not touched.
    config = AlgorithmConfig(dual_clip=3.0)
    loss, stats = ppo_clip(of_ratios([2.0, 5.0, 5.0, 0.5], [-2.0, -2.0, 2.0, -2.0]), config)
    torch.testing.assert_close(loss, torch.tensor([4.0, 6.0, -2.4, 1.6]))
    assert stats["dual_clipped"].tolist() == [0, 1, 0, 0]


def test_dual_clip_with_a_large_bound_is_the_clip():
    case = random_inputs(0)
    plain, _ = ppo_clip(case, AlgorithmConfig())
    assert torch.equal(ppo_clip(case, AlgorithmConfig(dual_clip=1e12))[0], plain)
    assert not torch.equal(ppo_clip(case, AlgorithmConfig(dual_clip=1.5))[0], plain)


def test_on_policy_the_ratio_is_one_to_the_bit_and_the_gradient_is_reinforce():
    generator = torch.Generator().manual_seed(0)
    log_probs, advantages = (5 * torch.randn(2, 1000, generator=generator)).unbind()
    log_probs.requires_grad_()
    config = AlgorithmConfig(clip_low=0.0, clip_high=0.0, dual_clip=2.0)  # the kink itself keeps the gradient
    loss, stats = ppo_clip(inputs(log_probs, log_probs.detach(), advantages), config)
    loss.sum().backward()
    assert torch.equal(stats["ratio"], torch.ones(1000))
    assert torch.equal(stats["kl_old"], torch.zeros(1000))
    assert not stats["clipped"].any()
    assert not stats["dual_clipped"].any()
    assert torch.equal(loss.detach(), -advantages)
    assert torch.equal(log_probs.grad, -advantages)


@pytest.mark.parametrize("dual_clip", [None, 1.8])
def test_gradients_agree_with_finite_differences_away_from_kinks(dual_clip):
    case = random_inputs(2)
    ratio = (case.log_probs_T - case.old_log_probs_T).exp()
    smooth = torch.stack([(ratio - kink).abs() for kink in (0.8, 1.2, 1.8)]).amin(0) > 1e-3
    assert smooth.sum() > 150
    case = inputs(case.log_probs_T[smooth], case.old_log_probs_T[smooth], case.advantages_T[smooth])

    def loss(log_probs: torch.Tensor) -> torch.Tensor:
        moved = inputs(log_probs, case.old_log_probs_T, case.advantages_T)
        return ppo_clip(moved, AlgorithmConfig(dual_clip=dual_clip))[0]

    assert torch.autograd.gradcheck(loss, (case.log_probs_T.clone().requires_grad_(),))


def test_where_a_clip_decides_there_is_no_gradient():
    case = of_ratios([2.0, 0.5, 5.0], [1.0, -1.0, -1.0])
    case.log_probs_T.requires_grad_()
    loss, stats = ppo_clip(case, AlgorithmConfig(dual_clip=3.0))
    loss.sum().backward()
    assert (stats["clipped"] + stats["dual_clipped"]).tolist() == [1, 1, 1]
    assert case.log_probs_T.grad.tolist() == [0, 0, 0]


def test_log_probs_far_apart_do_not_make_nan():
    log_probs = torch.tensor([0.0, 0.0, -1000.0], requires_grad=True)
    loss, _ = ppo_clip(
        inputs(log_probs, torch.tensor([-1000.0, -1000.0, 0.0]), torch.tensor([0.0, 1, 1])), AlgorithmConfig()
    )
    loss.sum().backward()
    assert loss.isfinite().all()
    assert log_probs.grad.isfinite().all()
    assert loss[0] == 0


def test_statistics_are_detached_and_of_every_token():
    case = random_inputs(3)
    case.log_probs_T.requires_grad_()
    loss, stats = get_policy_loss("ppo_clip")(case, AlgorithmConfig(dual_clip=3.0))
    assert loss.requires_grad
    assert all(x.shape == loss.shape and x.dtype == torch.float32 and not x.requires_grad for x in stats.values())
    assert set(stats["clipped"].tolist()) == {0.0, 1.0}
