"""The built-in ops: what each node of a pipeline does on one worker."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from siirl.algorithms.filters import get_filter
from siirl.algorithms.masking import global_mean
from siirl.algorithms.mismatch import Trust, parts_of
from siirl.algorithms.registry import get_advantage
from siirl.algorithms.rewards_kl import kl_token_rewards
from siirl.checkpoint.store import directory_name
from siirl.dag.plan import Step
from siirl.data.batch import Batch, Column, Ragged
from siirl.data.dynamic_sampling import GroupPool
from siirl.rewards.pool import RewardResult
from siirl.rollout.contract import LENGTH
from siirl.rollout.options import greedy, sampling_of
from siirl.rollout.partial import CarriedGroups
from siirl.telemetry.jsonl import rewrite
from siirl.training.losses import LOSSES
from siirl.worker.context import Context, Op, Output

log = logging.getLogger(__name__)

OPS: dict[str, Op] = {}


def _op(function: Callable[..., Any]) -> Callable[..., Any]:
    OPS[function.__name__] = function
    return function


@_op
def data(context: Context, batch: Batch, node: Step) -> Output:
    """This worker's prompts of the step, or of the round where groups are sampled dynamically."""
    prompts = None if context.pool is None else context.pool.next_prompts(context.collectives)
    items = context.loader.next_indices(prompts)
    read = context.reader.read(items, supervised=bool(node.params.get("supervised")))
    context.metrics.sum("data/skipped", len(items) - len(read))
    if "response_ids" in read:
        _lengths(context, read)
    return Output(batch=read)


@_op
def rollout(context: Context, batch: Batch, node: Step) -> Output:
    """``rollout.group_size`` responses to each prompt."""
    if isinstance(context.pool, CarriedGroups):
        return _partial_rollout(context, context.pool, batch, node)
    config = context.config.rollout
    prompts, samples = _asked(batch, "prompt_ids", config.group_size)
    sampling = sampling_of(config, context.models.encode)
    done = context.models.generate(prompts, samples, sampling, config.group_size, context.rollout_seed)
    take = torch.arange(len(batch)).repeat_interleave(config.group_size)
    versions = torch.full((len(samples),), context.policy_version, dtype=torch.int64)
    _count_responses(context, batch.ragged("prompt_ids").take(take), done.response_ids, done.finish_reason)
    columns: dict[str, Column] = {
        "sample_id": samples,
        "response_ids": done.response_ids,
        "rollout_log_probs": done.log_probs,
        "finish_reason": done.finish_reason,
        "policy_version": versions,
    }
    if done.router_choices is not None:
        columns["router_choices"] = done.router_choices
    return Output(columns, take)


def _partial_rollout(context: Context, pool: CarriedGroups, batch: Batch, node: Step) -> Output:
    """Go on with the groups carried, begin those of ``batch``, and end with as many whole ones as a step has."""
    config, column = context.config.rollout, node.reads["prompt_ids"]
    held, held_samples = _asked(pool.prompts_held, column, config.group_size)
    new, new_samples = _asked(batch, "prompt_ids", config.group_size)
    done = context.models.generate(
        held + new,
        torch.cat((held_samples, new_samples)),
        sampling_of(config, context.models.encode),
        config.group_size,
        context.rollout_seed,
        pool.begun(len(new_samples)),
        pool.enough,
    )

    def end(prompts: Batch) -> Batch:
        chosen, drawn = pool.split(prompts, done, context.policy_version)
        rows = chosen.take(torch.arange(len(chosen)).repeat_interleave(config.group_size))
        _count_responses(context, rows.ragged(column), drawn.ragged("response_ids"), drawn.dense("finish_reason"))
        context.metrics.sum("rollout/carried_groups", len(pool.prompts_held))
        columns: dict[str, Column] = {
            "response_ids": drawn["response_ids"],
            "rollout_log_probs": drawn["log_probs"],
            "finish_reason": drawn["finish_reason"],
            "policy_version": drawn["policy_version"],
        }
        written = {node.writes[formal]: values for formal, values in columns.items() if formal in node.writes}
        return rows.with_columns(sample_id=_asked(chosen, column, config.group_size)[1], **written)

    return Output(whole=end)


def _asked(prompts: Batch, column: str, group: int) -> tuple[list[list[int]], torch.Tensor]:
    """The prompts to generate for, and the ids of their samples, int64 [prompts · group]."""
    if not len(prompts):
        return [], torch.empty(0, dtype=torch.int64)
    samples = prompts.dense("sample_id")[:, None] + torch.arange(group)
    return [row.tolist() for row in prompts.ragged(column).rows()], samples.flatten()


def _count_responses(context: Context, prompt_ids: Ragged, response_ids: Ragged, finish_reason: torch.Tensor) -> None:
    truncated = float((finish_reason == LENGTH).sum())
    context.metrics.mean("response/truncated_fraction", truncated, len(finish_reason))
    _lengths(context, Batch({"response_ids": response_ids, "prompt_ids": prompt_ids}))


@_op
def reward(context: Context, batch: Batch, node: Step) -> dict[str, torch.Tensor]:
    """Score responses in the reward processes; a sample without a score is marked failed."""
    results = _score(context, batch)
    failed = torch.tensor([r.reward is None for r in results], dtype=torch.bool)
    values = torch.tensor([r.reward or 0.0 for r in results], dtype=torch.float32)
    good = values[~failed].double()
    context.metrics.mean("reward/mean", float(good.sum()), len(good))
    context.metrics.std("reward/std", float(good.sum()), float(good.square().sum()), len(good))
    context.metrics.sum("reward/failed", float(failed.sum()))
    return {"reward": values, "failed": failed}


@_op
def advantage(context: Context, batch: Batch, node: Step) -> dict[str, Ragged]:
    """The registered estimator ``algorithm.advantage``."""
    return get_advantage(context.config.algorithm.advantage)(batch, context.config.algorithm, context.collectives)


@_op
def filter(context: Context, batch: Batch, node: Step) -> Output:
    """Keep the rows that the registered filter ``params.name`` marks."""
    keep = get_filter(node.params["name"])(batch, context.config.algorithm)
    context.metrics.mean("data/kept_fraction", float(keep.sum()), len(keep))
    return Output(take=keep.nonzero().squeeze(1))


@_op
def dynamic_sampling(context: Context, batch: Batch, node: Step) -> Output:
    """Hold the groups of which the registered filter ``params.name`` keeps rows; go on when they fill the step."""
    keep = get_filter(node.params["name"])(batch, context.config.algorithm)
    return Output(whole=partial(_fill_step, context, keep))


def _fill_step(context: Context, keep: torch.Tensor, batch: Batch) -> Batch | None:
    """The step's rows, or None for another round; ``keep`` marks the rows of this round that passed."""
    assert isinstance(context.pool, GroupPool)
    pool, metrics = context.pool, context.metrics
    passed = batch.take(keep.nonzero().squeeze(1))
    generated, kept = _groups(batch), _groups(passed)
    metrics.sum("sampling/generated_groups", generated)
    metrics.sum("sampling/filtered_groups", generated - kept)
    metrics.sum("sampling/kept_groups", kept)
    rows = pool.add(passed, context.collectives)
    if rows is None:
        return None
    metrics.mean("sampling/rounds", pool.rounds, 1)
    metrics.sum("sampling/trained_groups", _groups(rows))
    metrics.sum("sampling/leftover_groups", _groups(pool.rows))
    return rows


@_op
def log_prob(context: Context, batch: Batch, node: Step) -> dict[str, Ragged]:
    """Log-probs of the response tokens under the node's model.

    With ``policy_version`` they are those of the policy that drew the tokens: a row of older weights keeps what rollout
    computed with them, for they are gone. With ``algorithm.old_log_probs: trust`` the actor's are rollout's, without a
    pass, while these agree.
    """
    assert node.model is not None
    trust = context.trust if node.model == "actor" else None
    if trust is not None and trust.applies(context.step):
        return {"log_probs": batch.ragged("rollout_log_probs")}
    found = context.models[node.model].log_probs(batch, context.config.algorithm.mini_batches)
    if "policy_version" in batch:
        older = (_staleness(context, batch) > 0).repeat_interleave(found.lengths)
        values = torch.where(older, batch.ragged("rollout_log_probs").values, found.values)
        found = Ragged(values, found.offsets)
    if trust is not None:
        _measure(context, trust, parts_of(found.values, batch.ragged("rollout_log_probs").values))
    return {"log_probs": found}


def _measure(context: Context, trust: Trust, parts: int) -> None:
    """Agree with all workers on how far rollout and training are apart, and say so where that changes what is done."""
    before, first = trust.within, trust.difference is None
    trust.measured(int(context.collectives.all_reduce(torch.tensor(parts), "max")), context.step)
    if context.collectives.rank or not context.first_holder or before == trust.within and not first:
        return
    found = f"step {context.step}: log-probs of rollout and training differ by up to {trust.difference:g} nats"
    bound = f"algorithm.trust_bound is {trust.bound:g}"
    if trust.within:
        log.info("%s, and %s: rollout's are trusted from the next step on", found, bound)
    else:
        log.warning("%s, but %s: they are recomputed until they agree", found, bound)


@_op
def value(context: Context, batch: Batch, node: Step) -> dict[str, Ragged]:
    """The critic's values."""
    assert node.model is not None
    return {"values": context.models[node.model].values(batch, context.config.algorithm.mini_batches)}


@_op
def kl_reward(context: Context, batch: Batch, node: Step) -> dict[str, Ragged]:
    """Rewards per token with the KL penalty, and the controller's next coefficient."""
    failed = batch.dense("failed") if "failed" in batch else torch.zeros(len(batch), dtype=torch.bool)
    rewards, kl = kl_token_rewards(
        batch.dense("reward"),
        failed,
        batch.ragged("old_log_probs"),
        batch.ragged("ref_log_probs"),
        context.kl.coef,
        context.config.algorithm.kl_reward_estimator,
    )
    mean, count = global_mean(kl, ~failed, context.collectives)
    context.metrics.mean("reward/kl_coef", context.kl.coef, 1)
    context.metrics.mean("reward/kl_per_sequence", mean, 1)
    context.kl.update(mean, count)
    return {"token_rewards": rewards}


@_op
def update(context: Context, batch: Batch, node: Step) -> None:
    """Optimise the node's model."""
    assert node.model is not None
    loss = LOSSES[node.params.get("loss", "policy")](context.config.algorithm)
    if "policy_version" in batch:
        ages = _staleness(context, batch)
        context.metrics.mean("rollout/staleness_mean", float(ages.sum()), len(ages))
        context.metrics.max("rollout/staleness_max", float(ages.max()) if len(ages) else None)
    batch = _measurable(context, _against_behaviour(context, batch))
    context.models[node.model].update(batch, loss, context.step, context.metrics)


def _staleness(context: Context, batch: Batch) -> torch.Tensor:
    """Steps of training that the weights which drew a row had not seen, int64 [rows]."""
    return context.step - 1 - batch.dense("policy_version")


def _against_behaviour(context: Context, batch: Batch) -> Batch:
    """Where samples may be of an older policy, the ratio is to the policy that drew them, as its engine computed it.

    Rollout and training are then compared on ``fresh`` rows alone, by ``train_log_probs`` where a pass computed them,
    else by the only update's own.
    """
    config = context.config
    if not (config.rollout.max_staleness or config.rollout.partial) or "rollout_log_probs" not in batch:
        return batch
    behaviour = batch.with_columns(old_log_probs=batch["rollout_log_probs"])
    single_update = config.algorithm.mini_batches * config.algorithm.epochs == 1
    if "policy_version" not in batch or not ("old_log_probs" in batch or single_update):
        return behaviour.drop(["rollout_log_probs"])
    if "old_log_probs" in batch:
        behaviour = behaviour.with_columns(train_log_probs=batch["old_log_probs"])
    return behaviour.with_columns(fresh=_staleness(context, batch) == 0)


def _measurable(context: Context, batch: Batch) -> Batch:
    """Without rollout's log-probs where the old ones are the same by trust: their difference would say nothing."""
    if context.trust is None or "rollout_log_probs" not in batch:
        return batch
    trusted = context.trust.applies(context.step)
    context.metrics.mean("rollout/trusted", float(trusted), 1)
    return batch.drop(["rollout_log_probs"]) if trusted else batch


@_op
def sync_weights(context: Context, batch: Batch, node: Step) -> None:
    """Give the rollout engine the actor's weights."""
    context.models.sync_rollout()
    context.policy_version = context.step


@_op
def evaluate(context: Context, batch: Batch, node: Step) -> None:
    """Greedy responses to this worker's held-out prompts."""
    if not context.held_out:
        context.metrics.mean("eval/reward_mean", 0.0, 0)
        return
    prompts = context.eval_reader.read(context.held_out)
    sampling = greedy(sampling_of(context.config.rollout, context.models.encode))
    ids = [row.tolist() for row in prompts.ragged("prompt_ids").rows()]
    done = context.models.generate(ids, prompts.dense("sample_id"), sampling, 1, 0)
    results = _score(context, prompts.with_columns(response_ids=done.response_ids))
    good = [r.reward for r in results if r.reward is not None]
    context.metrics.mean("eval/reward_mean", sum(good), len(good))


@_op
def record_samples(context: Context, batch: Batch, node: Step) -> None:
    """Write the first samples of the step's order to ``samples/``; a bounded number whatever the batch."""
    wanted = context.config.logging.samples_per_step
    first = batch.dense("slot") < -(-wanted // context.config.rollout.group_size)
    rows = batch.take(first.nonzero().squeeze(1))
    decode = context.models.decode
    lines = []
    for i, row in enumerate(rows.texts("row")):
        sample = json.loads(row)
        failed = "failed" in rows and bool(rows.dense("failed")[i])
        line = {
            "stage": context.stage,
            "step": context.step,
            "sample_id": int(rows.dense("sample_id")[i]),
            "prompt": decode(rows.ragged("prompt_ids").rows()[i].tolist()),
            "response": decode(rows.ragged("response_ids").rows()[i].tolist()),
            "reward": None if failed or "reward" not in rows else float(rows.dense("reward")[i]),
            "answer": sample.get(context.config.data.answer_key),
        }
        lines.append(json.dumps(line))
    parts = context.collectives.gather_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
    if parts is None or not context.first_holder:
        return
    merged = sorted((json.loads(line) for part in parts for line in part.splitlines()), key=lambda s: s["sample_id"])
    path = context.run_dir / "samples" / f"{directory_name(context.stage, context.step)}.jsonl"
    path.parent.mkdir(exist_ok=True)
    rewrite(path, [json.dumps(sample).encode() + b"\n" for sample in merged[:wanted]])


def _score(context: Context, batch: Batch) -> list[RewardResult]:
    rows = [json.loads(text) for text in batch.texts("row")]
    responses = [context.models.decode(ids.tolist()) for ids in batch.ragged("response_ids").rows()]
    return context.rewards.score([context.reader.prompt_text(row) for row in rows], responses, rows)


def _groups(batch: Batch) -> int:
    return len(batch.dense("group_id").unique()) if len(batch) else 0


def _lengths(context: Context, batch: Batch) -> None:
    prompts, responses = batch.lengths("prompt_ids"), batch.lengths("response_ids")
    metrics = context.metrics
    metrics.mean("prompt/length_mean", float(prompts.sum()), len(prompts))
    metrics.mean("response/length_mean", float(responses.sum()), len(responses))
    metrics.max("response/length_max", float(responses.max()) if len(responses) else None)
    metrics.sum("throughput/samples", len(responses))
    metrics.sum("throughput/tokens", float(prompts.sum() + responses.sum()))
