from __future__ import annotations

import json
import math

import pytest
import torch

from siirl.algorithms.kl import AdaptiveKL, FixedKL, kl_controller, kl_estimate
from siirl.config.schema import AlgorithmConfig
from siirl.errors import RequestError


def test_estimators_follow_schulmans_formulas():
    # d = log(1/2) - log(1/4) = log 2, so r = ref/policy = 1/2: k1 = log 2, k2 = log(2)²/2, k3 = r - 1 - log r.
    log_probs, ref = torch.tensor([math.log(0.5)]), torch.tensor([math.log(0.25)])
    expected = {"k1": math.log(2), "k2": math.log(2) ** 2 / 2, "k3": 0.5 - 1 + math.log(2)}
    for kind, value in expected.items():
        assert kl_estimate(log_probs, ref, kind).item() == pytest.approx(value, rel=1e-6)


def test_k1_and_k3_are_unbiased_and_k3_varies_less():
    generator = torch.Generator().manual_seed(0)
    policy = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    reference = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    exact = (policy * (policy / reference).log()).sum().item()
    drawn = torch.multinomial(policy, 400_000, replacement=True, generator=generator)
    samples = {k: kl_estimate(policy.log()[drawn], reference.log()[drawn], k) for k in ("k1", "k3")}
    for x in samples.values():
        assert abs(x.mean().item() - exact) < 4 * x.std().item() / math.sqrt(len(x))
    assert samples["k3"].std() < samples["k1"].std()


def test_k3_is_never_negative_and_keeps_digits_near_the_reference():
    d = torch.cat([torch.linspace(-30, 30, 10_001), torch.logspace(-12, 0, 500), -torch.logspace(-12, 0, 500)])
    assert (kl_estimate(d, torch.zeros_like(d), "k3") >= 0).all()
    # k3 ≈ d²/2 - d³/6: exp(-d) - 1 + d in float32 would be 0 or 1.2e-7 here, not 5e-7.
    k3 = kl_estimate(torch.tensor([1e-3]), torch.zeros(1), "k3").item()
    assert k3 == pytest.approx(0.5e-6 - 1e-9 / 6, rel=1e-3)


def test_k3_and_its_gradient_stay_finite_for_any_float32_log_probs():
    log_probs = torch.tensor([-1000.0, -100.0, 0.0, -1e-9], requires_grad=True)
    k3 = kl_estimate(log_probs, torch.tensor([0.0, 0.0, -1000.0, -1e-9]), "k3")
    k3.sum().backward()
    assert k3.isfinite().all()
    assert log_probs.grad.isfinite().all()
    assert k3[2].item() == pytest.approx(999.0)  # k3 grows like d where the policy is the likelier one


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_gradients_agree_with_finite_differences(kind):
    generator = torch.Generator().manual_seed(1)
    log_probs = torch.randn(8, generator=generator, dtype=torch.float64).requires_grad_()
    ref = torch.randn(8, generator=generator, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: kl_estimate(x, ref, kind), (log_probs,))


def test_an_unknown_estimator_is_a_request_error():
    with pytest.raises(RequestError, match="no KL estimator 'k4'; known: k1, k2, k3"):
        kl_estimate(torch.zeros(1), torch.zeros(1), "k4")


def test_adaptive_controller_follows_ziegler():
    # e = (6.6 - 6)/6 = 0.1 and K = 500/10000 = 0.05: coef · 1.005.
    controller = AdaptiveKL(coef=0.2, target=6.0, horizon=10_000)
    controller.update(kl=6.6, samples=500)
    assert controller.coef == pytest.approx(0.2 * 1.005)


def test_adaptive_controller_pushes_towards_the_target_with_a_clipped_error():
    for kl, factor in [(6.0, 1.0), (600.0, 1.02), (0.0, 0.98), (-1.0, 0.98)]:  # ±0.2 · 1000/10000
        controller = AdaptiveKL(coef=0.2, target=6.0, horizon=10_000)
        controller.update(kl, samples=1000)
        assert controller.coef == pytest.approx(0.2 * factor)


def test_fixed_controller_stays():
    controller = FixedKL(0.1)
    controller.update(kl=1e9, samples=10)
    assert controller.coef == 0.1


def test_the_config_chooses_the_controller():
    assert type(kl_controller(AlgorithmConfig(kl_reward_coef=0.3))) is FixedKL
    adaptive = kl_controller(
        AlgorithmConfig(kl_reward_coef=0.3, kl_controller="adaptive", kl_target=2.0, kl_horizon=50.0)
    )
    assert isinstance(adaptive, AdaptiveKL)
    assert (adaptive.coef, adaptive.target, adaptive.horizon) == (0.3, 2.0, 50.0)


@pytest.mark.parametrize("kind", ["fixed", "adaptive"])
def test_a_controller_goes_on_from_its_state_through_json(kind):
    config = AlgorithmConfig(kl_reward_coef=0.3, kl_controller=kind)
    kept, resumed = kl_controller(config), kl_controller(config)
    kept.update(kl=20.0, samples=64)
    resumed.load_state_dict(json.loads(json.dumps(kept.state_dict())))
    kept.update(kl=3.0, samples=64)
    resumed.update(kl=3.0, samples=64)
    assert resumed.coef == kept.coef
