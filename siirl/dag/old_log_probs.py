"""What ``algorithm.old_log_probs`` needs of a pipeline and of the other keys."""

from __future__ import annotations

from collections.abc import Iterable

from siirl.config.schema import AlgorithmConfig, Config
from siirl.dag.conditions import Live
from siirl.errors import RequestError


def check_old_log_probs(live: Iterable[Live], config: Config) -> None:
    """Refuse a policy that cannot work in a pipeline. One that updates no policy, such as a warm-up's, is left alone.

    Raises:
        RequestError: the nodes do not read what the policy needs, or another key stands against it.
    """
    policy, items = config.algorithm.old_log_probs, list(live)
    updates = [i for i in items if i.node.op == "update" and i.node.params.get("loss", "policy") == "policy"]
    if policy == "recompute" or not updates:
        return
    for key in ("max_staleness", "partial"):
        if getattr(config.rollout, key):
            raise RequestError(
                f"algorithm.old_log_probs is {policy}, but with rollout.{key} above 0 old log-probs are those of "
                "rollout in any case, for the weights that drew the samples are gone; set "
                "algorithm.old_log_probs=recompute"
            )
    need = updates
    if policy == "correct":
        _check_bounds(config.algorithm)
    else:
        need = [i for i in items if i.node.op == "log_prob" and i.node.model == "actor"]
    for item in need:
        if "rollout_log_probs" not in item.reads:
            raise item.node.error(f"must read 'rollout_log_probs' for algorithm.old_log_probs={policy}", "reads")


def _check_bounds(config: AlgorithmConfig) -> None:
    low, high = config.correction_low, config.correction_high
    if low is not None and config.correction == "tis":
        raise RequestError(
            "algorithm.correction_low is for masked importance sampling; set algorithm.correction=mis, or leave it out"
        )
    if high < 1 or (low or 0.0) > 1 or low == high:
        raise RequestError(
            f"algorithm.correction_low is {low} and correction_high {high}, and 1 does not lie between them: the ratio "
            "of tokens on which rollout and training agree"
        )
