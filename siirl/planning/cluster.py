"""What a cluster is made of: nodes, devices, links, hosts. Bytes, seconds, FLOP/s, bytes/s throughout."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from siirl.config.schema import NonNegativeFloat, Positive, PositiveFloat, Section
from siirl.errors import RequestError
from siirl.planning.files import find, read

Share = Annotated[float, Field(gt=0, le=1)]


class Device(Section):
    """One device. A node's CPU core is one too: then its memory is the host's."""

    name: str = Field(description="as the vendor calls it")
    memory_bytes: PositiveFloat
    reserved_bytes: NonNegativeFloat = Field(0.0, description="what the runtime, its kernels and communication take")
    flops: dict[str, PositiveFloat] = Field(description="dense matrix products per second, by dtype")
    memory_bandwidth: PositiveFloat
    op_overhead_s: NonNegativeFloat = Field(5e-6, description="least time between two operators of one stream")
    contention: float = Field(1.0, ge=1, description="how much slower a device is while all of its node are busy")
    unified: bool = Field(False, description="computes in the host's memory, which a node's workers share")


class Sustained(Section):
    """Which part of a peak real work reaches."""

    training: Share = Field(0.40, description="of FLOP/s, forward and backward")
    inference: Share = Field(0.50, description="of FLOP/s, forward only")
    memory: Share = Field(0.65, description="of the memory bandwidth, when decoding")
    network: Share = Field(0.80, description="of a link's bandwidth")


class Link(Section):
    """What one device can send, and at the same time receive, and how long the first byte takes."""

    bandwidth: PositiveFloat
    latency_s: NonNegativeFloat


class Links(Section):
    """Between the devices of a node, and between nodes."""

    intra_node: Link
    inter_node: Link


class Host(Section):
    """One node's host."""

    memory_bytes: PositiveFloat
    nic_bandwidth: PositiveFloat = Field(description="of the interface that hosts talk over")
    latency_s: NonNegativeFloat = Field(50e-6, description="of one message between processes of two hosts")
    serialise_bandwidth: PositiveFloat = Field(
        1e9, description="bytes/s at which one process turns a batch into messages, or messages into a batch"
    )
    message_s: NonNegativeFloat = Field(5e-4, description="a controller's work for one message to or from a worker")
    reward_s: NonNegativeFloat = Field(1e-3, description="one call of a rule-based reward")
    step_overhead_s: NonNegativeFloat = Field(1e-3, description="Python's time around one node of a pipeline")


class Cluster(Section):
    """Nodes that are all alike."""

    name: str
    description: str = ""
    nodes: Positive
    devices_per_node: Positive
    oversubscribe: bool = Field(False, description="more workers than devices may run, and share them")
    device: Device
    links: Links
    host: Host
    sustained: Sustained = Field(default_factory=Sustained)
    measured: str | None = Field(None, description="a record of `siirl bench --json`, seen from this file")

    @property
    def devices(self) -> int:
        return self.nodes * self.devices_per_node

    def grown(self, workers: int) -> Cluster:
        """The cluster itself, or one of as many more nodes as ``workers`` need where they do not share devices."""
        nodes = -(-workers // self.devices_per_node)
        return self if self.oversubscribe or nodes <= self.nodes else self.model_copy(update={"nodes": nodes})

    def workers_per_node(self, workers: int) -> int:
        """Workers on a node that is full; beyond the devices only where they share them."""
        return max(min(workers, self.devices_per_node), -(-workers // self.nodes))

    def hosts(self, workers: int) -> list[int]:
        """The number of each worker's node, by rank."""
        each = self.workers_per_node(workers)
        return [rank // each for rank in range(workers)]

    def turns(self, workers: int) -> float:
        """How many workers take turns on a device that also carries their messages, as a host's cores do; else 1."""
        return max(1.0, self.workers_per_node(workers) / self.devices_per_node) if self.device.unified else 1.0

    def peak(self, dtype: str) -> float:
        """FLOP/s of a dtype.

        Raises:
            RequestError: the cluster's file does not say.
        """
        if dtype not in self.device.flops:
            raise RequestError(
                f"the cluster '{self.name}' gives no device.flops.{dtype}; it has {', '.join(self.device.flops)}"
            )
        return self.device.flops[dtype]

    def memory(self, workers: int) -> float:
        """Bytes one worker may use."""
        if self.device.unified:
            return self.host.memory_bytes / self.workers_per_node(workers)
        return self.device.memory_bytes - self.device.reserved_bytes


def load_cluster(name: str) -> Cluster:
    """The cluster of a file, or of a shipped one's name.

    Raises:
        RequestError: no such file, or something in it is wrong.
    """
    file = find(name, "clusters", "cluster")
    cluster = read(Cluster, file)
    if cluster.measured is None:
        return cluster
    from siirl.planning.measured import with_measured

    return with_measured(cluster, file.parent / cluster.measured)
