"""What an update minimises: each loss turns a packed micro-batch's outputs into one number and its statistics.

The engine does not know the algorithm: it hands over outputs, rows and token weights whose sum over all micro-batches
and workers is already the normalisation.  R: response tokens of the micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from siirl.algorithms.kl import kl_estimate
from siirl.algorithms.mismatch import correction, ratio_statistics
from siirl.algorithms.policy_losses import PolicyLossInput
from siirl.algorithms.registry import get_policy_loss
from siirl.algorithms.value_loss import value_loss
from siirl.config.schema import AlgorithmConfig
from siirl.data.batch import Batch
from siirl.telemetry.accumulator import StepMetrics

Loss = Callable[[tuple[Tensor, ...], Batch, Tensor, StepMetrics], Tensor]
"""(model outputs, the micro-batch's rows, weights_R, metrics) -> the micro-batch's share of the loss."""


def policy_update(config: AlgorithmConfig) -> Loss:
    """Policy loss, KL to a reference, entropy bonus.

    Without a column ``old_log_probs`` the samples are of the very policy that is updated: its own log-probs, detached,
    stand in, and the ratio is exactly 1 whatever the split into micro-batches. With a column ``rollout_log_probs`` the
    agreement of rollout and training is measured, and with ``algorithm.old_log_probs: correct`` the policy loss, but
    neither KL nor entropy, is weighed by it (see :func:`siirl.algorithms.mismatch.correction`). Where the old log-probs
    are rollout's, it is measured on the rows that a column ``fresh`` marks, by training's own: the column
    ``train_log_probs``, or those that are updated.
    """
    policy_loss = get_policy_loss(config.policy_loss)

    def loss(outputs: tuple[Tensor, ...], rows: Batch, weights_R: Tensor, metrics: StepMetrics) -> Tensor:
        log_probs_R, entropy_R = outputs
        device = log_probs_R.device
        old_R = rows.ragged("old_log_probs").values.to(device) if "old_log_probs" in rows else log_probs_R.detach()
        advantages_R = rows.ragged("advantages").values.to(device)
        offsets = rows.ragged("response_ids").offsets.to(device)
        loss_R, stats = policy_loss(PolicyLossInput(log_probs_R, old_R, advantages_R, offsets), config)
        counted = (weights_R > 0).float()
        policy_R = weights_R
        if "rollout_log_probs" in rows:
            rollout_R = rows.ragged("rollout_log_probs").values.to(device)
            train_R, same_R = old_R, counted
            if "fresh" in rows:
                given = rows.ragged("train_log_probs").values.to(device) if "train_log_probs" in rows else log_probs_R
                train_R = given.detach()
                same_R = counted * rows.dense("fresh").to(device).repeat_interleave(offsets.diff())
            _add_agreement(train_R, rollout_R, same_R, metrics)
            if config.old_log_probs == "correct":
                factor_R, bounded_R = correction(old_R, rollout_R, offsets, config)
                policy_R = weights_R * factor_R
                _add_correction(config.correction, factor_R, bounded_R, counted, metrics)
        total = (policy_R * loss_R).sum()
        tokens = counted.sum().item()
        kl_R = old_R - log_probs_R.detach()
        if "ref_log_probs" in rows:
            kl_R = kl_estimate(log_probs_R, rows.ragged("ref_log_probs").values.to(device), config.kl_estimator)
            total = total + config.kl_coef * (weights_R * kl_R).sum()
        if config.entropy_coef:
            total = total - config.entropy_coef * (weights_R * entropy_R).sum()
        metrics.mean("actor/kl", _sum(counted * kl_R), tokens)
        metrics.mean("actor/entropy", _sum(counted * entropy_R), tokens)
        _add_statistics(stats, counted, metrics)
        return total

    return loss


def value_update(config: AlgorithmConfig) -> Loss:
    """The critic's clipped squared error."""

    def loss(outputs: tuple[Tensor, ...], rows: Batch, weights_R: Tensor, metrics: StepMetrics) -> Tensor:
        (values_R,) = outputs
        device = values_R.device
        old_R, returns_R = rows.ragged("values").values.to(device), rows.ragged("returns").values.to(device)
        loss_R, clipped_R = value_loss(values_R, old_R, returns_R, config.value_clip)
        total = config.value_coef * (weights_R * loss_R).sum()
        counted = (weights_R > 0).float()
        tokens = counted.sum().item()
        metrics.mean("critic/clip_fraction", _sum(counted * clipped_R), tokens)
        metrics.mean("critic/value_mean", _sum(counted * values_R), tokens)
        metrics.mean("critic/return_mean", _sum(counted * returns_R), tokens)
        return total

    return loss


def supervised_update(config: AlgorithmConfig) -> Loss:
    """Negative log-likelihood of the response tokens."""

    def loss(outputs: tuple[Tensor, ...], rows: Batch, weights_R: Tensor, metrics: StepMetrics) -> Tensor:
        log_probs_R, entropy_R = outputs
        total = -(weights_R * log_probs_R).sum()
        counted = (weights_R > 0).float()
        metrics.mean("actor/entropy", _sum(counted * entropy_R), counted.sum().item())
        return total

    return loss


LOSSES: dict[str, Callable[[AlgorithmConfig], Loss]] = {
    "policy": policy_update,
    "value": value_update,
    "sft": supervised_update,
}


def _add_statistics(stats: dict[str, Tensor], counted: Tensor, metrics: StepMetrics) -> None:
    """A policy loss's own statistics: ``clipped`` as a fraction, ``ratio`` by its extremes, others by their mean."""
    for name, x_R in stats.items():
        if name == "ratio":
            metrics.max("actor/ratio_max", _max(x_R, counted))
            metrics.min("actor/ratio_min", None if (top := _max(-x_R, counted)) is None else -top)
        else:
            key = "clip_fraction" if name == "clipped" else name
            metrics.mean(f"actor/{key}", _sum(counted * x_R), counted.sum().item())


def _add_agreement(train_R: Tensor, rollout_R: Tensor, counted: Tensor, metrics: StepMetrics) -> None:
    """How far training's log-probs are from rollout's with the same weights, and the statistics of their ratio."""
    tokens = counted.sum().item()
    gap_R = counted * (train_R - rollout_R).abs()
    metrics.max("rollout/logprob_diff_max", _max(gap_R, counted))
    metrics.mean("rollout/logprob_diff_mean", _sum(gap_R), tokens)
    found = ratio_statistics(train_R, rollout_R)
    metrics.mean("rollout/ratio_mean", _sum(counted * found["ratio"]), tokens)
    metrics.max("rollout/ratio_max", _max(found["ratio"], counted))
    metrics.min("rollout/ratio_min", None if (top := _max(-found["ratio"], counted)) is None else -top)
    for name in ("chi2", "kl_k1", "kl_k3"):
        metrics.mean(f"rollout/{name}", _sum(counted * found[name]), tokens)


def _add_correction(kind: str, factor_R: Tensor, bounded_R: Tensor, counted: Tensor, metrics: StepMetrics) -> None:
    tokens = counted.sum().item()
    metrics.mean("rollout/correction_mean", _sum(counted * factor_R), tokens)
    name = "truncated" if kind == "tis" else "masked"
    metrics.mean(f"rollout/{name}_fraction", _sum(counted * bounded_R), tokens)


def _sum(x: Tensor) -> float:
    return x.detach().double().sum().item()


def _max(x: Tensor, counted: Tensor) -> float | None:
    kept = x.detach()[counted.bool()]
    return kept.max().item() if len(kept) else None
