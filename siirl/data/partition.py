"""Cutting costs into shares of equal sums: three ways, and one to even out what they leave.

Longest first to the lightest share (LPT: R. L. Graham, "Bounds on multiprocessing timing anomalies", 1969; its largest
share is at most 4/3 - 1/(3 shares) times the best possible one), one unit at a time or, where there are thousands, a
round of units at a time; and differencing (N. Karmarkar and R. M. Karp, "The differencing method of set partitioning",
1982). Costs are int64 and not negative. Importing this module imports no torch.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

# Rounds dealt one by one at the end of a large deal; the longer units before them are dealt there and back at once.
_LAST_ROUNDS = 16
# Exchanges between heavy and light shares, each over all pairs of shares at once.
_EXCHANGES = 24
# Shares whose largest is above the mean by no more than this part of it are left as they are.
_CLOSE = 2048


def rising(keys: Ints) -> Ints:
    """The order of rising keys, which are not negative; equal ones by position. Radix sort, 16 bits at a time."""
    order = np.argsort(keys.astype(np.uint16), kind="stable")
    rest = keys >> 16
    while rest.any():
        order = order[np.argsort(rest[order].astype(np.uint16), kind="stable")]
        rest = rest >> 16
    return order


def falling(costs: Ints) -> Ints:
    """The order of falling costs; equal ones by position."""
    return rising(costs.max() - costs) if len(costs) else np.zeros(0, np.int64)


def longest_first(costs: Ints, loads: list[int], counts: list[int], sums: Sequence[int]) -> Ints:
    """Give units, sorted by falling cost, to the lightest share one by one; ``loads`` and ``counts`` go along.

    Of equally light shares the one with fewer units comes first, then the one with the smaller ``sums``.
    """
    lightest = [(*share, index) for index, share in enumerate(zip(loads, counts, sums, strict=True))]
    heapq.heapify(lightest)
    shares = np.empty(len(costs), np.int64)
    for unit, cost in enumerate(costs.tolist()):
        load, count, earlier, share = lightest[0]
        shares[unit] = share
        loads[share], counts[share] = load + cost, count + 1
        heapq.heapreplace(lightest, (load + cost, count + 1, earlier, share))
    return shares


def differencing(costs: list[int], count: int) -> Ints:
    """Join the two most uneven partial partitions, heavy shares with light ones, until one is left."""
    empty: list[tuple[int, list[int]]] = [(0, []) for _ in range(count - 1)]
    heap = [(-cost, unit, [(cost, [unit]), *empty]) for unit, cost in enumerate(costs)]
    heapq.heapify(heap)
    while len(heap) > 1:
        (_, first, heavy), (_, second, light) = heapq.heappop(heap), heapq.heappop(heap)
        joined = [(a + b, left + right) for (a, left), (b, right) in zip(heavy, reversed(light), strict=True)]
        joined.sort(key=lambda share: -share[0])
        heapq.heappush(heap, (joined[-1][0] - joined[0][0], min(first, second), joined))
    shares = np.empty(len(costs), np.int64)
    for share, (_, units) in enumerate(heap[0][2]):
        shares[units] = share
    return shares


def deal_rounds(costs: Ints, loads: Ints, *, equal: bool = False) -> Ints:
    """Longest first, a round of units at a time: one each to the lightest shares. ``loads`` goes along.

    Args:
        costs: of the units, falling, int64 [N].
        loads: of the shares so far, int64 [W].
        equal: every share takes part in every round, so that their counts differ by one at most; else those that
            would be above the mean leave the round, for a giant unit is company enough.
    """
    count, mean = len(loads), -(-(int(loads.sum()) + int(costs.sum())) // len(loads))
    shares = np.empty(len(costs), np.int64)
    place = _there_and_back(costs, loads, mean, shares)
    bits = max(1, (count - 1).bit_length())
    while place < len(costs):
        key = np.sort((loads << bits) | np.arange(count))
        room = np.searchsorted(key >> bits, mean - costs[place], side="right")
        taking = count if equal else max(int(room), -(-count // 4))
        part = costs[place : place + taking]
        who = key[: len(part)] & ((1 << bits) - 1)
        shares[place : place + len(part)] = who
        loads[who] += part
        place += len(part)
    return shares


def _there_and_back(costs: Ints, loads: Ints, mean: int, shares: Ints) -> int:
    """Deal all but the last rounds in one go, every second one backwards, unless a share would pass the mean by that.

    Returns:
        the number of units dealt.
    """
    count = len(loads)
    rounds = (len(costs) // count - _LAST_ROUNDS) // 2 * 2
    if rounds <= 0 or loads.any():
        return 0
    dealt = costs[: rounds * count].reshape(rounds // 2, 2, count)
    sums = (dealt[:, 0] + dealt[:, 1, ::-1]).sum(0)
    if int(sums.max()) > mean:
        return 0
    loads += sums
    there = np.arange(count)
    shares[: rounds * count] = np.tile(np.concatenate([there, there[::-1]]), rounds // 2)
    return rounds * count


def even_out(costs: Ints, shares: Ints, count: int, *, equal: bool = False) -> None:
    """Exchange units between heavy and light shares while that evens them; changes ``shares`` in place.

    Shares are paired, the heaviest with the lightest. In each pair the two units are exchanged whose costs differ most
    nearly by half of the gap; a unit may also change places with nothing, unless counts are to stay ``equal``. No share
    becomes heavier than the heavier one of its pair was.
    """
    loads = np.bincount(shares, costs, count).astype(np.int64)
    mean = -(-int(loads.sum()) // count)
    enough = mean + mean // _CLOSE
    if count < 2 or int(loads.max()) <= enough:
        return
    unit, cost = _table(costs, shares, count)
    if 4 * int(loads.max()) < 1 << 31:  # half the bytes to look at
        cost, loads = cost.astype(np.int32), loads.astype(np.int32)
    for turn in range(_EXCHANGES):
        order = np.argsort(loads, kind="stable")
        pairs = min(count // 2, int((loads > enough).sum()))
        if pairs == 0:
            break
        light, heavy = order[:pairs], order[::-1][:pairs]
        gap = loads[heavy] - loads[light]
        difference = cost[:, heavy] - np.roll(cost[:, light], turn, axis=0)
        distance = np.abs(2 * difference - gap)
        if equal:
            alone = (unit[:, heavy] < 0) != (np.roll(unit[:, light], turn, axis=0) < 0)
            distance = np.where(alone, gap, distance)
        row = distance.argmin(0)
        pair = np.flatnonzero(distance[row, np.arange(len(gap))] < gap)
        a, b, h, lo = row[pair], (row[pair] - turn) % len(unit), heavy[pair], light[pair]
        moved = difference[a, pair]
        loads[h] -= moved
        loads[lo] += moved
        for table in (unit, cost):
            table[a, h], table[b, lo] = table[b, lo], table[a, h]
    row, share = np.nonzero(unit >= 0)
    shares[unit[row, share]] = share


def _table(costs: Ints, shares: Ints, count: int) -> tuple[Ints, NDArray[np.signedinteger]]:
    """The units of each share as a column, filled up with -1, with at least one -1 each; and their costs, 0 there."""
    order = rising(shares)
    sizes = np.bincount(shares, minlength=count)
    row = np.arange(len(shares)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    unit = np.full((int(sizes.max()) + 1, count), -1, np.int64)
    cost = np.zeros_like(unit)
    unit[row, shares[order]] = order
    cost[row, shares[order]] = costs[order]
    return unit, cost
