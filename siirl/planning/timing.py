"""How long a step of the plan takes: what each share computes by itself, and what all of them do together."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from siirl.dag import Step, due
from siirl.planning.collectives import Group, all_reduce, exchange, gather_integers, reduce_scatter
from siirl.planning.generation import LAYER_OPS, rollout_seconds
from siirl.planning.job import Job
from siirl.planning.loads import Loads, Training
from siirl.planning.memory import split_parameters
from siirl.planning.traffic import moved_bytes
from siirl.planning.workload import Floats

# Time of the assignment, and of packing and unpacking a row's bytes, on a host.
ASSIGN_S_PER_ROW = 1e-7
PACK_BANDWIDTH = 4e9
# Bytes that AdamW reads and writes a parameter: weight, gradient and two moments in, all but the gradient out.
OPTIMISER_BYTES = {"adamw": 28, "adamw8bit": 16, "sgd": 12}
# A backward pass is two forward passes' products; the projection to the vocabulary is computed again for it.
BACKWARD, AGAIN = 2, 1


@dataclass(frozen=True)
class Phase:
    """A stretch that shares compute alone, and what follows together.

    Attributes:
        seconds: of each share, float64 [shares].
        together: seconds of a collective of all workers afterwards; None: nobody waits.
    """

    seconds: Floats
    together: float | None = None


def phases(job: Job, step: Step, loads: Loads) -> list[Phase]:
    """The phases of a step; a step that costs nothing but Python has one."""
    overhead = job.cluster.host.step_overhead_s
    sources, targets = len(loads.prompts), len(loads.training[0].rows)
    if step.kind == "redistribute":
        return _redistribute(job, step, loads)
    if step.op == "rollout":
        return [Phase(rollout_seconds(job, loads) + overhead)]
    if step.op == "evaluate":
        return [Phase(_evaluation(job, sources) + overhead)]
    if step.op == "reward":
        rewards = loads.prompts * job.group * job.cluster.host.reward_s / job.config.reward.workers
        return [Phase(rewards + overhead)]
    if step.op in ("log_prob", "value") and step.model:
        seconds = sum((_pass(job, step.model, mini, backward=False) for mini in loads.training), np.zeros(targets))
        return [Phase(seconds + overhead)]
    if step.op == "update" and step.model:
        return _update(job, step.model, loads)
    if step.op == "sync_weights":
        return [Phase(np.full(targets, _sync(job) + overhead))]
    return [Phase(np.full(sources, overhead if step.kind == "node" else 0.0))]


def _evaluation(job: Job, sources: int) -> Floats:
    """Seconds of one response, of mean length, to each held-out prompt, and of its reward."""
    prompts = -(-job.config.data.held_out // job.rollout.data)
    if not prompts:
        return np.zeros(sources)
    length = max(1, round(job.lengths.mean_response))
    none = np.zeros(0)
    loads = Loads(np.full((1, prompts), length), np.array([float(prompts)]), (), job.lengths.prompt, none, none)
    rewards = prompts * job.cluster.host.reward_s / job.config.reward.workers
    return np.full(sources, float(rollout_seconds(job, loads)[0]) + rewards)


def share_of_steps(job: Job, step: Step) -> float:
    """The part of the training steps in which a step of the plan runs."""
    counted = min(job.config.training.steps, 1000)
    return sum(due(step, number, job.config) for number in range(1, counted + 1)) / counted


def _redistribute(job: Job, step: Step, loads: Loads) -> list[Phase]:
    """The integers of all rows, gathered together; then each share sends and receives its own rows."""
    assert step.target is not None
    cluster, moved = job.cluster, moved_bytes(job, step)
    samples = job.config.data.prompts_per_step * job.group
    together = gather_integers(cluster, moved.control, job.workers) + samples * ASSIGN_S_PER_ROW
    inner = step.target.workers // step.target.data
    messages = min(job.workers - 1, samples * (1 - moved.kept) / job.workers)
    a_token = moved.row / (job.lengths.prompt + job.lengths.mean_response) / inner
    busiest = np.maximum(loads.leaving, loads.arriving) * a_token
    waiting = exchange(cluster, Group(job.workers), 0.0, messages, job.workers) if job.workers > 1 else 0.0
    per_byte = exchange(cluster, Group(job.workers), 1e9, 0, job.workers) / 1e9
    inside = exchange(cluster, Group(inner), moved.shared, inner - 1, job.workers)
    seconds = waiting + busiest * (per_byte + 2 / PACK_BANDWIDTH) + inside
    return [Phase(np.full(len(loads.prompts), cluster.host.step_overhead_s), together), Phase(seconds)]


def _copies(job: Job, mini: Training, prompt: float) -> Floats:
    """Times a prompt is computed on each share: once a group, and once more in each further micro-batch of it."""
    rows = np.maximum(mini.rows, 1)
    mean = prompt + mini.tokens / rows
    per_group = mini.rows / np.maximum(mini.groups, 1)
    fitting = np.maximum(1, job.budget // mean)
    return mini.groups * np.minimum(per_group, np.ceil(per_group / fitting))


def _micros(job: Job, mini: Training, prompt: float) -> Floats:
    """Micro-batches on each share."""
    return np.maximum(1, np.ceil((mini.tokens + mini.rows * prompt) / job.budget))


def _pass(job: Job, model: str, mini: Training, *, backward: bool) -> Floats:
    """Seconds of a forward pass over a mini-batch, or of a forward and a backward pass, on each share."""
    shape, layout, cluster = job.shapes[model], job.training, job.cluster
    prompt = job.lengths.prompt
    copies = _copies(job, mini, prompt)
    tokens = copies * prompt + mini.tokens
    pairs = copies * prompt * (prompt + 1) / 2 + prompt * mini.tokens + (mini.squares + mini.tokens) / 2
    layers = shape.forward_flops(1, 0, 0) * tokens + shape.forward_flops(0, 1, 0) * pairs
    head = shape.forward_flops(0, 0, 1) * mini.tokens * (model != "critic")
    again = backward and job.config.training.recompute == "full" and not job.megatron
    flops = layers * (1 + BACKWARD * backward + again) + head * (1 + (BACKWARD + AGAIN) * backward)
    sustained = cluster.sustained.training if backward else cluster.sustained.inference
    inner = layout.tensor * layout.context * layout.pipeline
    seconds = flops / (inner * cluster.peak(job.config.training.dtype) * sustained)
    micros = _micros(job, mini, prompt)
    dispatch = cluster.device.op_overhead_s * LAYER_OPS * shape.num_layers / layout.pipeline
    seconds = seconds + micros * dispatch * (1 + BACKWARD * backward)
    seconds = seconds + _inner_communication(job, model, tokens, 1 + backward)
    if job.sharded:
        # layers are gathered while the one before computes: what is longer counts
        group = Group(job.replicas, layout.tensor)
        once = reduce_scatter(cluster, group, job.itemsize * job.held(model), job.workers)
        seconds = np.maximum(seconds, micros * once * (1 + backward))
    return seconds * (1 + (layout.pipeline - 1) / micros)


def _inner_communication(job: Job, model: str, tokens: Floats, passes: int) -> Floats:
    """Seconds of tensor, context, expert and pipeline parallel communication of a share's tokens.

    Two all-reduces a layer and pass of the tokens' hidden states among the tensor group; keys and values once around
    the context group; hidden states to e experts and back; hidden states to the next stage.
    """
    shape, layout, cluster = job.shapes[model], job.training, job.cluster
    hidden = shape.hidden_size * job.itemsize
    layers = shape.num_layers / layout.pipeline
    mine = tokens / layout.context
    per_token = 0.0
    if layout.tensor > 1:
        per_token += layers * 2 * all_reduce(cluster, Group(layout.tensor), hidden, job.workers)
        per_token -= layers * 2 * all_reduce(cluster, Group(layout.tensor), 0.0, job.workers)
    if layout.context > 1:
        around = Group(layout.context, layout.tensor)
        size = shape.cache_bytes(job.itemsize) / shape.num_layers * (layout.context - 1) / layout.tensor
        per_token += layers * exchange(cluster, around, size, 0, job.workers)
    if layout.expert > 1:
        experts = Group(layout.expert, layout.tensor * layout.context)
        size = 2 * hidden * shape.experts_per_token * (layout.expert - 1) / layout.expert
        per_token += layers * exchange(cluster, experts, size, 0, job.workers)
    if layout.pipeline > 1:
        along = Group(2, job.workers // layout.pipeline)
        per_token += exchange(cluster, along, hidden / layout.tensor, 0, job.workers)
    return mine * per_token * passes


def _update(job: Job, model: str, loads: Loads) -> list[Phase]:
    """Mini-batch by mini-batch: forward and backward, the gradients' sum over all shares, the optimiser."""
    config, overhead = job.config, job.cluster.host.step_overhead_s
    after = _gradients(job, model) + _optimiser(job, model)
    once = [Phase(_pass(job, model, mini, backward=True) + overhead, after) for mini in loads.training]
    return once * config.algorithm.epochs


def _gradients(job: Job, model: str) -> float:
    cluster, group = job.cluster, Group(job.replicas, job.training.tensor)
    if job.megatron:
        # gradients are reduced and scattered in float32, weights gathered in their own type
        parameters = sum(split_parameters(job, model))
        scatter = reduce_scatter(cluster, group, 4 * parameters, job.workers)
        return scatter + reduce_scatter(cluster, group, job.itemsize * parameters, job.workers)
    collective = reduce_scatter if job.sharded else all_reduce
    return collective(cluster, group, 4.0 * job.held_trainable(model), job.workers) if job.replicas > 1 else 0.0


def _optimiser(job: Job, model: str) -> float:
    cluster = job.cluster
    each = OPTIMISER_BYTES[job.config.training.optimizer]
    parameters = job.held_trainable(model)
    if job.megatron:
        parameters = sum(split_parameters(job, model)) / job.replicas
    elif job.sharded:
        parameters /= job.replicas
    return each * parameters / (cluster.device.memory_bandwidth * cluster.sustained.memory)


def _sync(job: Job) -> float:
    """Seconds until the rollout engine has the new weights: gathered whole where training has them in parts."""
    if job.shared_weights or not job.generates:
        return 0.0
    cluster, parameters = job.cluster, job.actor.parameters
    copied = (4 + job.itemsize) * parameters / job.rollout.tensor
    seconds = copied / (cluster.device.memory_bandwidth * cluster.sustained.memory)
    if job.sharded or (job.training.tensor > 1 and not job.megatron):
        parts = Group(job.workers) if job.sharded else Group(job.training.tensor)
        seconds += reduce_scatter(cluster, parts, 4.0 * parameters, job.workers)
    elif job.megatron:
        inner = Group(job.training.tensor * job.training.pipeline * job.training.context)
        seconds += reduce_scatter(cluster, inner, float(job.itemsize) * parameters, job.workers)
    return seconds
