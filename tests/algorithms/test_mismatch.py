"""Statistics and corrections of the ratio of training to rollout, by hand, by NumPy and by enumeration."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from siirl.algorithms.mismatch import Trust, correction, parts_of, ratio_statistics
from siirl.config.schema import AlgorithmConfig
from siirl.data.batch import Batch
from tests.training.batches import batch, config, decoder
from tests.training.test_updates import padded_policy_loss, update, weights

OFFSETS = torch.tensor([0, 3, 3, 5])  # the second response is empty
# ratios 1, 4, 1/8 and 1/2, 3
RATIOS = [1.0, 4.0, 0.125, 0.5, 3.0]


def settings(**changes: Any) -> AlgorithmConfig:
    return AlgorithmConfig(old_log_probs="correct", **changes)


def ratios(values: list[float]) -> tuple[Tensor, Tensor]:
    rollout = torch.linspace(-3.0, -0.5, len(values))
    return rollout + torch.tensor(values).log(), rollout


HALF, ROOT = 4 / 8, math.sqrt(1.5)
CASES: list[tuple[dict[str, Any], list[float], list[bool]]] = [
    ({"correction": "tis"}, [1, 2, 0.125, 0.5, 2], [False, True, False, False, True]),
    ({"correction": "tis", "correction_high": 3.5}, [1, 3.5, 0.125, 0.5, 3], [False, True, False, False, False]),
    (
        {"correction": "mis", "correction_low": 0.25, "correction_high": 3.5},
        [1, 0, 0, 0.5, 3],
        [False, True, True, False, False],
    ),
    ({"correction": "mis"}, [1, 0, 0.125, 0.5, 0], [False, True, False, False, True]),
    ({"correction": "tis", "correction_level": "sequence"}, [HALF] * 3 + [1.5] * 2, [False] * 5),
    (
        {"correction": "tis", "correction_level": "sequence", "correction_high": 1.25},
        [HALF] * 3 + [1.25] * 2,
        [False] * 3 + [True] * 2,
    ),
    (
        {"correction": "mis", "correction_level": "sequence", "correction_low": 0.6},
        [0] * 3 + [1.5] * 2,
        [True] * 3 + [False] * 2,
    ),
    (
        {"correction": "mis", "correction_level": "geometric", "correction_low": 0.75, "correction_high": 1.2},
        [HALF ** (1 / 3)] * 3 + [0] * 2,
        [False] * 3 + [True] * 2,
    ),
    (
        {"correction": "tis", "correction_level": "geometric", "correction_high": 1.3},
        [HALF ** (1 / 3)] * 3 + [ROOT] * 2,
        [False] * 5,
    ),
]


@pytest.mark.parametrize(("changes", "factors", "bounded"), CASES)
def test_by_hand(changes: dict[str, Any], factors: list[float], bounded: list[bool]) -> None:
    train, rollout = ratios(RATIOS)
    found, outside = correction(train.requires_grad_(), rollout, OFFSETS, settings(**changes))
    torch.testing.assert_close(found, torch.tensor(factors, dtype=torch.float32), atol=1e-6, rtol=1e-6)
    assert outside.tolist() == bounded
    assert not found.requires_grad and found.dtype == torch.float32


def by_numpy(train: Tensor, rollout: Tensor, lengths: list[int], c: AlgorithmConfig) -> np.ndarray:
    """Response by response, with products of probabilities and not sums of log-probs."""
    pieces, start = [], 0
    for n in lengths:
        pi, mu = (np.exp(x[start : start + n].numpy().astype(np.float64)) for x in (train, rollout))
        start += n
        r = pi / mu
        if c.correction_level != "token" and n:
            whole = np.prod(pi) / np.prod(mu)
            r = np.full(n, whole if c.correction_level == "sequence" else whole ** (1 / n))
        if c.correction == "tis":
            pieces.append(np.minimum(r, c.correction_high))
        else:
            pieces.append(np.where((r >= (c.correction_low or 0)) & (r <= c.correction_high), r, 0))
    return np.concatenate(pieces)


@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
@pytest.mark.parametrize("kind", ["tis", "mis"])
def test_against_numpy(kind: str, level: str) -> None:
    g = torch.Generator().manual_seed(3)
    lengths = [4, 1, 0, 9, 2, 30]
    rollout = -3 * torch.rand(sum(lengths), generator=g)
    train = rollout + 0.5 * torch.randn(sum(lengths), generator=g)
    c = settings(correction=kind, correction_level=level, correction_low=0.5 if kind == "mis" else None)
    found, _ = correction(train, rollout, torch.tensor([0, *np.cumsum(lengths)]), c)
    np.testing.assert_allclose(found.numpy(), by_numpy(train, rollout, lengths, c), rtol=2e-5)


def test_where_both_agree_nothing_is_corrected() -> None:
    train, _ = ratios(RATIOS)
    for level in ("token", "sequence", "geometric"):
        for kind in ("tis", "mis"):
            c = settings(correction=kind, correction_level=level, correction_low=0.99 if kind == "mis" else None)
            found, outside = correction(train, train.clone(), OFFSETS, c)
            assert found.tolist() == [1.0] * 5 and not outside.any()


def test_a_token_that_rollout_could_hardly_draw_stays_finite() -> None:
    found, outside = correction(torch.tensor([-0.1]), torch.tensor([-200.0]), torch.tensor([0, 1]), settings())
    assert found.tolist() == [2.0] and outside.all()
    assert all(torch.isfinite(x).all() for x in ratio_statistics(torch.tensor([-0.1]), torch.tensor([-200.0])).values())


def test_the_statistics_are_the_divergences_in_expectation() -> None:
    """Σ over a whole vocabulary, weighted by the probability of being drawn: the definitions, no sampling."""
    g = torch.Generator().manual_seed(1)
    mu, pi = (torch.randn(50, generator=g, dtype=torch.float64).log_softmax(0) for _ in range(2))
    found = ratio_statistics(pi, mu)
    expected = {
        "ratio": 1.0,
        "chi2": float(((pi.exp() - mu.exp()).square() / mu.exp()).sum()),
        "kl_k1": float((mu.exp() * (mu - pi)).sum()),
        "kl_k3": float((mu.exp() * (mu - pi)).sum()),
    }
    for name, value in expected.items():
        assert float((mu.exp() * found[name]).sum()) == pytest.approx(value, rel=1e-9), name
    assert (found["kl_k3"] >= 0).all()


def off_policy() -> Batch:
    samples = batch().drop(["ref_log_probs"])
    g = torch.Generator().manual_seed(4)
    old = samples.ragged("old_log_probs")
    noise = 0.6 * torch.randn(old.values.shape, generator=g)
    return samples.with_columns(rollout_log_probs=type(old)(old.values + noise, old.offsets))


def test_recompute_measures_and_changes_nothing() -> None:
    samples = off_policy()
    plain, _ = update(config(), samples.drop(["rollout_log_probs"]))
    measured, metrics = update(config(), samples)
    for name, weight in weights(plain).items():
        assert torch.equal(weights(measured)[name], weight)
    valid = ~samples.dense("failed").repeat_interleave(samples.lengths("response_ids"))
    gap = (samples.ragged("old_log_probs").values - samples.ragged("rollout_log_probs").values)[valid].double()
    ratio = gap.exp()
    expected = {
        "logprob_diff_max": gap.abs().max(), "logprob_diff_mean": gap.abs().mean(), "ratio_mean": ratio.mean(),
        "ratio_max": ratio.max(), "ratio_min": ratio.min(), "chi2": (ratio**2 - 1).mean(), "kl_k1": -gap.mean(),
        "kl_k3": (ratio - 1 - gap).mean(),
    }  # fmt: skip
    for name, value in expected.items():
        assert metrics[f"rollout/{name}"] == pytest.approx(float(value), rel=1e-5), name
    assert not [name for name in metrics if "fraction" in name and name.startswith("rollout/")]


@pytest.mark.parametrize("budget", [16, 64, 1000])
@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
@pytest.mark.parametrize("kind", ["tis", "mis"])
def test_the_factors_weigh_the_policy_loss_and_its_normalisation_stays(kind: str, level: str, budget: int) -> None:
    """The update equals one with advantages times the factors: PPO's loss is linear in them where no sign changes."""
    samples = off_policy()
    bottom, top = {"token": (0.7, 1.3), "sequence": (0.1, 3.0), "geometric": (0.8, 1.2)}[level]
    low = {"algorithm__correction_low": bottom} if kind == "mis" else {}
    chosen = config(
        algorithm__old_log_probs="correct", algorithm__correction=kind, algorithm__correction_level=level,
        algorithm__correction_high=top, training__micro_batch_tokens=budget, **low,
    )  # fmt: skip
    corrected, metrics = update(chosen, samples)
    lengths = samples.lengths("response_ids").tolist()
    train, rollout = (samples.ragged(name).values for name in ("old_log_probs", "rollout_log_probs"))
    factors = torch.from_numpy(by_numpy(train, rollout, lengths, chosen.algorithm)).float()
    advantages = samples.ragged("advantages")
    weighed = samples.with_columns(advantages=type(advantages)(advantages.values * factors, advantages.offsets))
    model = decoder()
    loss = padded_policy_loss(model, weighed, chosen)
    loss.backward()
    assert metrics["actor/loss"] == pytest.approx(loss.item(), abs=1e-6)
    for name, parameter in model.named_parameters():
        expected = parameter.detach() - 0.5 * parameter.grad
        torch.testing.assert_close(weights(corrected)[name], expected, atol=2e-6, rtol=2e-5)
    valid = ~samples.dense("failed").repeat_interleave(samples.lengths("response_ids"))
    key = "rollout/truncated_fraction" if kind == "tis" else "rollout/masked_fraction"
    share = float((factors >= top if kind == "tis" else factors == 0)[valid].float().mean())
    assert 0 < share < 1
    assert metrics[key] == pytest.approx(share)
    assert metrics["rollout/correction_mean"] == pytest.approx(float(factors[valid].mean()), rel=1e-5)


def test_with_one_update_the_policy_itself_is_compared_with_rollout() -> None:
    """No column of old log-probs: the ratio that is corrected by is that of the update's own pass."""
    samples = off_policy().drop(["old_log_probs"])
    _, metrics = update(config(algorithm__old_log_probs="correct", algorithm__correction_high=1.3), samples)
    assert metrics["actor/ratio_max"] == metrics["actor/ratio_min"] == 1.0
    assert metrics["rollout/ratio_max"] > 1.3
    assert 0 < metrics["rollout/truncated_fraction"] < 1


def test_trust_follows_the_measurements() -> None:
    trust = Trust(bound=0.1, every=3)
    used = []
    differences = iter([0.05, 0.0999, 0.3, 0.2, 0.1, 0.02, 0.02])
    for step in range(1, 14):
        used.append(trust.applies(step))
        if not used[-1]:
            trust.measured(round(1e6 * next(differences)), step)
        assert trust.applies(step) == used[-1], "the same however often a step asks"
    # measured at 1 and 4; at 7 beyond the bound, so at 8 again, and at 9, which lets 10 and 11 trust; then at 12
    assert used == [False, True, True, False, True, True, False, False, False, True, True, False, True]


def test_trust_goes_on_from_its_state() -> None:
    trust, other = Trust(0.1, 5), Trust(0.1, 5)
    trust.measured(50_000, 7)
    other.load_state_dict(trust.state_dict())
    assert other == trust and other.applies(8) and not other.applies(12)
    assert not Trust(0.1, 5).applies(8)


def test_no_number_is_beyond_every_bound() -> None:
    trust = Trust(1e9, 5)
    trust.measured(parts_of(torch.tensor([float("nan"), 0.0]), torch.zeros(2)), 1)
    assert not trust.within
    assert parts_of(torch.empty(0), torch.empty(0)) == 0
    assert parts_of(torch.tensor([0.0, -0.25]), torch.zeros(2)) == 250_000
    assert parts_of(torch.tensor([1e-9]), torch.zeros(1)) == 1
