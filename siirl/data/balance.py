"""Which worker gets which sample: a pure function of integers, so every worker computes the same answer alone.

Samples are dealt in units (a sample, or a whole group) and in strata (mini-batches), each of which is balanced by
itself; :mod:`siirl.data.partition` cuts a stratum into shares. Where the samples are already nearly even, most of them
stay where they are.

Importing this module imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from siirl.data.partition import Ints, deal_rounds, differencing, even_out, falling, longest_first, rising

# Shares are even when the largest is at most one hundredth above the smallest it could be.
TOLERANCE = 100

# Differencing keeps units x workers sums; beyond this, rounds that are evened out come as near.
DIFFERENCING_LIMIT = 1 << 18

# From so many units on they are dealt in rounds and not one by one.
MANY = 2048


def assign(
    costs: Ints,
    workers: int,
    *,
    groups: Ints | None = None,
    strata: Ints | None = None,
    home: Ints | None = None,
    equal: bool = False,
) -> Ints:
    """Return the target worker of every sample, int64 [N].

    costs: work of each sample, not negative, int64 [N]; groups: samples of one group get one worker; strata: each
    stratum is balanced by itself, and the sum of all of them too; home: the worker that holds each sample now, -1 for
    none; equal: in each stratum the numbers of units of the workers differ by one at most, whatever they cost.
    Each worker gets at least one unit of every stratum that has as many units as there are workers. Equal costs are
    told apart by position (groups: by their number), so callers sort samples by id first. The largest share of a
    stratum is at most 1 % above a lower bound of what any assignment reaches, or the better one of LPT's and
    differencing's; the sums over all strata differ by no more than the shares of the most uneven stratum, or by 1 %.
    Raises ValueError.
    """
    _check(costs, workers, groups=groups, strata=strata, home=home)
    if len(costs) == 0:
        return np.zeros(0, np.int64)
    unit_of = None if groups is None else np.unique(groups, return_inverse=True)[1]
    unit_costs = costs if unit_of is None else _sum_by(unit_of, costs)
    members = _members(strata, unit_of, len(unit_costs))
    targets = None
    if home is not None and not equal:
        unit_home = home if unit_of is None else _majority(unit_of, home, costs + 1, workers)
        targets = _stay(unit_costs, workers, members, unit_home)
    if targets is None:
        targets = _deal(unit_costs, workers, members, equal)
        if home is not None and (home >= 0).any():
            shares = targets if unit_of is None else targets[unit_of]
            targets = _match(shares, home, costs + 1, workers)[targets]
    return targets if unit_of is None else targets[unit_of]


def _check(costs: Ints, workers: int, **columns: Ints | None) -> None:
    if workers < 1:
        raise ValueError(f"samples are assigned to at least one worker, not {workers}")
    if len(costs) and costs.min() < 0:
        raise ValueError(f"a sample cannot cost {costs.min()}")
    for name, column in columns.items():
        if column is not None and len(column) != len(costs):
            raise ValueError(f"{name} has {len(column)} samples, costs has {len(costs)}")
    home = columns["home"]
    if home is not None and len(home) and not -1 <= home.min() <= home.max() < workers:
        raise ValueError(f"home names a worker outside 0 .. {workers - 1}")


def _members(strata: Ints | None, unit_of: Ints | None, units: int) -> list[Ints]:
    """The units of each stratum."""
    if strata is None:
        return [np.arange(units)]
    unit_strata = strata
    if unit_of is not None:
        unit_strata = np.zeros(units, np.int64)
        unit_strata[unit_of] = strata
        if (unit_strata[unit_of] != strata).any():
            raise ValueError("a group lies in two strata, so it cannot go to one worker in each of them")
    return [np.flatnonzero(unit_strata == stratum) for stratum in np.unique(unit_strata)]


def _sum_by(index: Ints, values: Ints, size: int = 0) -> Ints:
    return np.bincount(index, values, size).astype(np.int64)  # exact up to 2^53


def _overlaps(index: Ints, home: Ints, weights: Ints, workers: int) -> Ints:
    """Return the pairs index * workers + home that occur, heaviest first."""
    pairs, pair_of = np.unique(index * workers + home, return_inverse=True)
    return pairs[falling(_sum_by(pair_of, weights))]


def _majority(unit_of: Ints, home: Ints, weights: Ints, workers: int) -> Ints:
    """Return the worker that holds most of each unit, -1 where none does."""
    at = home >= 0
    pairs = _overlaps(unit_of[at], home[at], weights[at], workers)
    units, first = np.unique(pairs // workers, return_index=True)
    majority = np.full(int(unit_of.max()) + 1, -1, np.int64)
    majority[units] = pairs[first] % workers
    return majority


def _least(costs: Ints, workers: int) -> int:
    """Return a bound no largest share is below: the mean, the largest unit, the units that must meet somewhere."""
    crowd = -(-len(costs) // workers)
    cheapest = costs if crowd == len(costs) else np.partition(costs, crowd - 1)[:crowd]
    return max(-(-int(costs.sum()) // workers), int(costs.max()), int(cheapest.sum()))


def _even(largest: int, least: int) -> bool:
    return largest * TOLERANCE <= least * (TOLERANCE + 1)


def _stay(costs: Ints, workers: int, members: Sequence[Ints], home: Ints) -> Ints | None:
    """Leave units at home and move only what is above the mean; None where that is uneven."""
    targets = home.copy()
    sums, spread = np.zeros(workers, np.int64), 0
    for units in members:
        own, at = costs[units], home[units]
        order = falling(own)
        order = order[rising(at[order] + 1)]
        begins = np.searchsorted(at[order], np.arange(workers))
        before = np.concatenate([[0], np.cumsum(own[order])])
        held = before[1:] - before[begins][at[order]]  # of its worker, up to and with each unit
        stays = (at[order] >= 0) & (held * workers <= own.sum())  # the longest stay, the shorter rest moves
        kept, excess = order[stays], units[order[~stays]]
        loads = _sum_by(at[kept], own[kept], workers)
        counts = np.bincount(at[kept], minlength=workers)
        excess = excess[falling(costs[excess])]
        targets[excess] = _add(costs[excess], loads, counts, sums)
        if not _even(int(loads.max()), _least(own, workers)) or (counts.min() == 0 and len(units) >= workers):
            return None
        sums = sums + loads
        spread = max(spread, int(loads.max() - loads.min()))
    gap, largest = int(sums.max() - sums.min()), int(sums.max())
    return targets if gap <= spread or _even(largest, int(sums.sum()) // workers) else None


def _add(costs: Ints, loads: Ints, counts: Ints, sums: Ints) -> Ints:
    """Give units, sorted by falling cost, to the lightest workers; ``loads`` and ``counts`` go along."""
    if len(costs) >= MANY:
        parts = deal_rounds(costs, loads)
        counts += np.bincount(parts, minlength=len(loads))
        return parts
    new_loads, new_counts = loads.tolist(), counts.tolist()
    parts = longest_first(costs, new_loads, new_counts, sums.tolist())
    loads[:], counts[:] = new_loads, new_counts
    return parts


def _deal(costs: Ints, workers: int, members: Sequence[Ints], equal: bool) -> Ints:
    """Cut every stratum into shares; heavier shares of a stratum join what is lighter so far."""
    shares = np.zeros(len(costs), np.int64)
    sums = np.zeros(workers, np.int64)
    for units in members:
        parts = _partition(costs[units], workers, equal)
        loads = _sum_by(parts, costs[units], workers)
        share_of = np.empty(workers, np.int64)
        share_of[np.argsort(-loads, kind="stable")] = np.argsort(sums, kind="stable")
        shares[units] = share_of[parts]
        sums[share_of] += loads
    return shares


def _partition(costs: Ints, workers: int, equal: bool) -> Ints:
    """Return the part of every unit: the best of what the ways of cutting give."""
    order = falling(costs)
    parts = np.empty(len(costs), np.int64)
    if equal or len(costs) >= MANY:
        parts[order] = deal_rounds(costs[order], np.zeros(workers, np.int64), equal=equal)
        if equal or np.bincount(parts, minlength=workers).min() > 0:
            even_out(costs, parts, workers, equal=equal)
            if equal or np.bincount(parts, minlength=workers).min() > 0:
                return parts
    loads = [0] * workers
    parts[order] = longest_first(costs[order], loads, [0] * workers, [0] * workers)
    if _even(max(loads), _least(costs, workers)) or len(costs) * workers > DIFFERENCING_LIMIT:
        return parts
    other = differencing(costs.tolist(), workers)
    missing = min(len(costs), workers) > len(np.unique(other))
    return parts if missing or _sum_by(other, costs, workers).max() >= max(loads) else other


def _match(shares: Ints, home: Ints, weights: Ints, workers: int) -> Ints:
    """Return the worker of every share: the pairs with the largest overlap first, the rest in order."""
    at = home >= 0
    pairs = _overlaps(shares[at], home[at], weights[at], workers)
    worker_of = np.full(workers, -1, np.int64)
    free = np.ones(workers, bool)
    while len(pairs):  # a pair that comes first for both its share and its worker is the one a greedy choice takes
        share, worker = np.divmod(pairs, workers)
        first = np.zeros(len(pairs), np.int64)
        for side in (share, worker):
            first[np.unique(side, return_index=True)[1]] += 1
        worker_of[share[first == 2]] = worker[first == 2]
        free[worker[first == 2]] = False
        pairs = pairs[(worker_of[share] < 0) & free[worker]]
    worker_of[worker_of < 0] = np.flatnonzero(free)
    return worker_of
