"""How long generation takes: prompts computed once, then one token a time for all sequences in flight."""

from __future__ import annotations

import heapq

import numpy as np

from siirl.planning.collectives import Group, all_reduce
from siirl.planning.job import Job
from siirl.planning.loads import Loads
from siirl.planning.memory import cache_rows
from siirl.planning.workload import Floats, Ints

# Operators of one layer and of the rest of a decoding iteration (projection, sampling, bookkeeping), as the PyTorch
# kernels make them; only their product with the device's op_overhead_s counts.
LAYER_OPS, TOKEN_OPS = 40, 60


def rollout_seconds(job: Job, loads: Loads) -> Floats:
    """Seconds of generation on each share, float64 [sources]."""
    prompts, length = loads.prompts, loads.prompt
    flops = job.actor.forward_flops(1, (length + 1) / 2, 1 / length) * length * prompts
    device = job.cluster.device
    prefill = flops / _rate(job) + device.op_overhead_s * LAYER_OPS * job.actor.num_layers
    return prefill + decode_seconds(job, loads.generated, length)


def decode_seconds(job: Job, responses: Ints, prompt: float) -> Floats:
    """Seconds to decode responses of given lengths, int64 [shares, n] (0: none), on each share.

    Between two moments at which a sequence begins or ends, the number in flight is constant and the cache grows
    linearly, so the iterations of such a stretch take the mean of its first and last one's time.
    """
    slots = cache_rows(job)[0]
    starts = np.zeros_like(responses) if responses.shape[1] <= slots else _starts(responses, slots)
    times = np.concatenate([starts, starts + responses], axis=1)
    change = np.concatenate([np.sign(responses), -np.sign(responses)], axis=1)
    order = np.argsort(times, axis=1, kind="stable")
    times = np.take_along_axis(times, order, 1)
    flying = np.cumsum(np.take_along_axis(change, order, 1), axis=1)[:, :-1].astype(float)
    begun = np.concatenate([starts, -starts], axis=1) * np.abs(change)
    offsets = np.cumsum(np.take_along_axis(begun, order, 1), axis=1)[:, :-1].astype(float)
    steps = np.diff(times, axis=1)
    middle = (times[:, 1:] + times[:, :-1]) / 2
    cached = flying * (prompt + middle) - offsets
    return np.where(flying > 0, iteration_seconds(job, flying, cached) * steps, 0.0).sum(axis=1)


def iteration_seconds(job: Job, sequences: Floats, cached: Floats) -> Floats:
    """Seconds of one decoding iteration: the slower of reading weights and cache and of computing, and dispatch.

    Args:
        sequences: in flight on a share.
        cached: tokens in their caches.
    """
    shape, cluster, tensor = job.actor, job.cluster, job.rollout.tensor
    weights = job.itemsize * read_parameters(job, sequences)
    cache = cached * shape.cache_bytes(job.itemsize)
    memory = (weights + cache) / (tensor * cluster.device.memory_bandwidth * cluster.sustained.memory)
    flops = sequences * shape.forward_flops(1, 0, 1) + 4 * shape.num_layers * shape.num_heads * shape.head_dim * cached
    seconds = np.maximum(memory, flops / _rate(job))
    if tensor > 1:
        group = Group(tensor)
        size = float(np.mean(sequences)) * shape.hidden_size * job.itemsize
        seconds = seconds + 2 * shape.num_layers * all_reduce(cluster, group, size, job.workers)
    return seconds + cluster.device.op_overhead_s * (LAYER_OPS * shape.num_layers + TOKEN_OPS)


def read_parameters(job: Job, sequences: Floats) -> Floats:
    """Parameters that one iteration reads: of the experts those that some sequence meets, E(1 - (1 - e/E)^b)."""
    shape = job.actor
    dense = shape.parameters - shape.num_layers * shape.expert_parameters - shape.embedding_parameters
    dense += shape.embedding_parameters * shape.tie_embeddings
    if not shape.num_experts:
        return np.full_like(sequences, dense)
    met = 1 - (1 - shape.experts_per_token / shape.num_experts) ** sequences
    return dense + met * shape.num_layers * shape.expert_parameters


def _rate(job: Job) -> float:
    """FLOP/s of one share's forward pass."""
    cluster = job.cluster
    return job.rollout.tensor * cluster.peak(job.config.training.dtype) * cluster.sustained.inference


def _starts(responses: Ints, slots: int) -> Ints:
    """The iteration in which each response begins where only so many are decoded together, first come first served."""
    starts = np.zeros_like(responses)
    for share, lengths in enumerate(responses.tolist()):
        free = [0] * slots
        for place, length in enumerate(lengths):
            begins = free[0]
            starts[share, place] = begins
            heapq.heapreplace(free, begins + length)
    return starts
