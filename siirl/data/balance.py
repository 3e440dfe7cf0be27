"""Which worker gets which sample: a pure function of integers, so every worker computes the same answer alone.

Samples are dealt in units (a sample, or a whole group) and in strata (mini-batches), each of which is balanced by
itself. Two methods cut a stratum into shares, and the better one is used: longest first to the lightest share (LPT:
R. L. Graham, "Bounds on multiprocessing timing anomalies", 1969; its largest share is at most 4/3 - 1/(3 workers)
times the best possible one), and differencing (N. Karmarkar and R. M. Karp, "The differencing method of set
partitioning", 1982). Where the samples are already nearly even, most of them stay where they are.

Importing this module imports no torch.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

# Shares are even when the largest is at most one hundredth above the smallest it could be.
TOLERANCE = 100

# Differencing keeps units x workers sums; beyond this, many units a worker make LPT as good as even.
DIFFERENCING_LIMIT = 1 << 18


def assign(
    costs: Ints, workers: int, *, groups: Ints | None = None, strata: Ints | None = None, home: Ints | None = None
) -> Ints:
    """Return the target worker of every sample, int64 [N].

    costs: work of each sample, not negative, int64 [N]; groups: samples of one group get one worker; strata: each
    stratum is balanced by itself, and the sum of all of them too; home: the worker that holds each sample now.
    Each worker gets at least one unit of every stratum that has as many units as there are workers. Equal costs are
    told apart by position (groups: by their number), so callers sort samples by id first. The largest share of a
    stratum is at most 1 % above a lower bound of what any assignment reaches, or the better one of LPT's and
    differencing's; the sums over all strata differ by no more than the shares of the most uneven stratum, or by 1 %.
    Raises ValueError.
    """
    _check(costs, workers, groups=groups, strata=strata, home=home)
    if len(costs) == 0:
        return np.zeros(0, np.int64)
    unit_of = np.arange(len(costs)) if groups is None else np.unique(groups, return_inverse=True)[1]
    unit_costs = _sum_by(unit_of, costs)
    unit_strata = np.zeros_like(unit_costs)
    if strata is not None:
        unit_strata[unit_of] = strata
        if (unit_strata[unit_of] != strata).any():
            raise ValueError("a group lies in two strata, so it cannot go to one worker in each of them")
    members = [np.flatnonzero(unit_strata == stratum) for stratum in np.unique(unit_strata)]
    if home is None:
        return _deal(unit_costs, workers, members)[unit_of]
    targets = _stay(unit_costs, workers, members, _majority(unit_of, home, costs + 1, workers))
    if targets is None:
        shares = _deal(unit_costs, workers, members)
        targets = _match(shares[unit_of], home, costs + 1, workers)[shares]
    return targets[unit_of]


def _check(costs: Ints, workers: int, **columns: Ints | None) -> None:
    if workers < 1:
        raise ValueError(f"samples are assigned to at least one worker, not {workers}")
    if len(costs) and costs.min() < 0:
        raise ValueError(f"a sample cannot cost {costs.min()}")
    for name, column in columns.items():
        if column is not None and len(column) != len(costs):
            raise ValueError(f"{name} has {len(column)} samples, costs has {len(costs)}")
    home = columns["home"]
    if home is not None and len(home) and not 0 <= home.min() <= home.max() < workers:
        raise ValueError(f"home names a worker outside 0 .. {workers - 1}")


def _sum_by(index: Ints, values: Ints, size: int | None = None) -> Ints:
    sums = np.zeros(int(index.max()) + 1 if size is None else size, np.int64)
    np.add.at(sums, index, values)
    return sums


def _overlaps(index: Ints, home: Ints, weights: Ints, workers: int) -> Ints:
    """Return the pairs index * workers + home that occur, heaviest first."""
    pairs, pair_of = np.unique(index * workers + home, return_inverse=True)
    return pairs[np.argsort(-_sum_by(pair_of, weights), kind="stable")]


def _majority(unit_of: Ints, home: Ints, weights: Ints, workers: int) -> Ints:
    """Return the worker that holds most of each unit."""
    pairs = _overlaps(unit_of, home, weights, workers)
    return pairs[np.unique(pairs // workers, return_index=True)[1]] % workers


def _least(costs: Ints, workers: int) -> int:
    """Return a bound no largest share is below: the mean, the largest unit, the units that must meet somewhere."""
    crowd = -(-len(costs) // workers)
    return max(-(-int(costs.sum()) // workers), int(costs.max()), int(np.sort(costs)[:crowd].sum()))


def _even(largest: int, least: int) -> bool:
    return largest * TOLERANCE <= least * (TOLERANCE + 1)


def _stay(costs: Ints, workers: int, members: Sequence[Ints], home: Ints) -> Ints | None:
    """Leave units at home and move only what is above the mean; None where that is uneven."""
    targets = home.copy()
    sums, spread = [0] * workers, 0
    for units in members:
        order = units[np.argsort(-costs[units], kind="stable")]
        total = int(costs[units].sum())
        loads, counts, full = [0] * workers, [0] * workers, [False] * workers
        excess = []
        for unit, cost, worker in zip(order.tolist(), costs[order].tolist(), home[order].tolist(), strict=True):
            full[worker] |= (loads[worker] + cost) * workers > total  # the longest stay, the shorter rest moves
            if full[worker]:
                excess.append(unit)
            else:
                loads[worker] += cost
                counts[worker] += 1
        targets[excess] = _longest_first(costs[excess], loads, counts, sums)
        if not _even(max(loads), _least(costs[units], workers)) or (min(counts) == 0 and len(units) >= workers):
            return None
        sums = [before + load for before, load in zip(sums, loads, strict=True)]
        spread = max(spread, max(loads) - min(loads))
    return targets if max(sums) - min(sums) <= spread or _even(max(sums), sum(sums) // workers) else None


def _deal(costs: Ints, workers: int, members: Sequence[Ints]) -> Ints:
    """Cut every stratum into shares; heavier shares of a stratum join what is lighter so far."""
    shares = np.zeros(len(costs), np.int64)
    sums = np.zeros(workers, np.int64)
    for units in members:
        parts = _partition(costs[units], workers)
        loads = _sum_by(parts, costs[units], workers)
        share_of = np.empty(workers, np.int64)
        share_of[np.argsort(-loads, kind="stable")] = np.argsort(sums, kind="stable")
        shares[units] = share_of[parts]
        sums[share_of] += loads
    return shares


def _partition(costs: Ints, workers: int) -> Ints:
    """Return the part of every unit: the better of LPT and differencing."""
    loads = [0] * workers
    order = np.argsort(-costs, kind="stable")
    parts = np.empty(len(costs), np.int64)
    parts[order] = _longest_first(costs[order], loads, [0] * workers, [0] * workers)
    if _even(max(loads), _least(costs, workers)) or len(costs) * workers > DIFFERENCING_LIMIT:
        return parts
    other = _differencing(costs.tolist(), workers)
    missing = min(len(costs), workers) > len(np.unique(other))
    return parts if missing or _sum_by(other, costs, workers).max() >= max(loads) else other


def _longest_first(costs: Ints, loads: list[int], counts: list[int], sums: Sequence[int]) -> Ints:
    """Give units, sorted by falling cost, to the lightest part one by one; ``loads`` and ``counts`` go along.

    Of equally light parts the one with fewer units comes first, then the one with the smaller sum of earlier strata.
    """
    lightest = [(*part, index) for index, part in enumerate(zip(loads, counts, sums, strict=True))]
    heapq.heapify(lightest)
    parts = np.empty(len(costs), np.int64)
    for unit, cost in enumerate(costs.tolist()):
        load, count, earlier, part = lightest[0]
        parts[unit] = part
        loads[part], counts[part] = load + cost, count + 1
        heapq.heapreplace(lightest, (load + cost, count + 1, earlier, part))
    return parts


def _differencing(costs: list[int], workers: int) -> Ints:
    """Join the two most uneven partial partitions, heavy parts with light ones, until one is left."""
    empty: list[tuple[int, list[int]]] = [(0, []) for _ in range(workers - 1)]
    heap = [(-cost, unit, [(cost, [unit]), *empty]) for unit, cost in enumerate(costs)]
    heapq.heapify(heap)
    while len(heap) > 1:
        (_, first, heavy), (_, second, light) = heapq.heappop(heap), heapq.heappop(heap)
        joined = [(a + b, left + right) for (a, left), (b, right) in zip(heavy, reversed(light), strict=True)]
        joined.sort(key=lambda part: -part[0])
        heapq.heappush(heap, (joined[-1][0] - joined[0][0], min(first, second), joined))
    parts = np.empty(len(costs), np.int64)
    for part, (_, units) in enumerate(heap[0][2]):
        parts[units] = part
    return parts


def _match(shares: Ints, home: Ints, weights: Ints, workers: int) -> Ints:
    """Return the worker of every share: the pairs with the largest overlap first, the rest in order."""
    worker_of = np.full(workers, -1, np.int64)
    free = np.ones(workers, bool)
    for pair in _overlaps(shares, home, weights, workers).tolist():
        share, worker = divmod(pair, workers)
        if worker_of[share] < 0 and free[worker]:
            worker_of[share], free[worker] = worker, False
    worker_of[worker_of < 0] = np.flatnonzero(free)
    return worker_of
