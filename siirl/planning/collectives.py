"""How long collectives take: the alpha-beta model, a node's devices first, then one device of each node with another.

An all-reduce of B bytes among n devices, m of them in each of k nodes, is a reduce-scatter within the node, an
all-reduce of the m-th part between nodes, and an all-gather within the node, each a ring in bandwidth and a tree in
latency (R. Thakur, R. Rabenseifner and W. Gropp, "Optimization of collective communication operations in MPICH", 2005).
Where workers share the cores that carry their messages, these take turns as well.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from siirl.planning.cluster import Cluster


@dataclass(frozen=True)
class Group:
    """Devices that communicate: ``size`` of them, ``stride`` ranks apart."""

    size: int
    stride: int = 1

    def in_node(self, cluster: Cluster, workers: int) -> int:
        """Members in one node."""
        return max(1, min(self.size, cluster.workers_per_node(workers) // self.stride))


def reduce_scatter(cluster: Cluster, group: Group, size: float, workers: int) -> float:
    """Seconds for ``size`` bytes; an all-gather to ``size`` bytes takes as long."""
    inside = group.in_node(cluster, workers)
    nodes = -(-group.size // inside)
    links, efficiency = cluster.links, cluster.sustained.network
    seconds = 0.0
    if inside > 1:
        link = links.intra_node
        seconds += (inside - 1) / inside * size / (link.bandwidth * efficiency) + link.latency_s * _rounds(inside)
    if nodes > 1:
        link = links.inter_node
        seconds += (nodes - 1) / nodes * size / inside / (link.bandwidth * efficiency)
        seconds += link.latency_s * _rounds(nodes)
    return seconds * cluster.turns(workers)


def all_reduce(cluster: Cluster, group: Group, size: float, workers: int) -> float:
    """Seconds for ``size`` bytes."""
    return 2 * reduce_scatter(cluster, group, size, workers)


def exchange(cluster: Cluster, group: Group, sent: float, messages: float, workers: int) -> float:
    """Seconds of an all-to-all in which each member sends ``sent`` bytes in so many messages."""
    if group.size == 1:
        return 0.0
    inside = group.in_node(cluster, workers)
    near = (inside - 1) / (group.size - 1)
    links, efficiency = cluster.links, cluster.sustained.network
    seconds = near * sent / (links.intra_node.bandwidth * efficiency)
    seconds += (1 - near) * sent / (links.inter_node.bandwidth * efficiency)
    link = links.intra_node if inside == group.size else links.inter_node
    return (seconds + link.latency_s * math.log2(1 + messages)) * cluster.turns(workers)


def gather_integers(cluster: Cluster, size: float, workers: int) -> float:
    """Seconds until every worker has all workers' integers, ``size`` bytes in sum: two rings over the hosts."""
    if workers == 1:
        return 0.0
    here = cluster.workers_per_node(workers)
    if here >= workers:
        link = cluster.links.intra_node
        return (2 * (workers - 1) * link.latency_s + size / link.bandwidth) * cluster.turns(workers)
    rate = cluster.host.nic_bandwidth * cluster.sustained.network / here
    return 2 * (workers - 1) * cluster.host.latency_s / here + size / rate


def _rounds(members: int) -> int:
    return math.ceil(math.log2(members))
