"""Where a worker stands among all workers, as a launcher's environment says it."""

from __future__ import annotations

import re
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from siirl.errors import RequestError

# A Slurm step's meeting port follows from its job's number, between the ports of services and those that systems lend.
_FIRST_PORT, _PORTS = 20_000, 10_000


@dataclass(frozen=True)
class Place:
    """Where a worker stands among all workers and on its node."""

    rank: int
    workers: int
    local_rank: int
    local_workers: int

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Place:
        """Read torchrun's variables, else srun's.

        Raises:
            RequestError: neither has set them.
        """
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        if all(name in environment for name in names):
            rank, workers, local_rank = (int(environment[name]) for name in names)
            return cls(rank, workers, local_rank, int(environment.get("LOCAL_WORLD_SIZE", "1")))
        names = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
        if all(name in environment for name in names):
            rank, workers, local_rank = (int(environment[name]) for name in names)
            return cls(rank, workers, local_rank, _slurm_local_workers(environment))
        raise RequestError("--launcher env: neither RANK, WORLD_SIZE and LOCAL_RANK (torchrun) nor SLURM_PROCID is set")

    def variables(self) -> dict[str, str]:
        """The place as torchrun's variables."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.workers),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_workers),
        }


def meet_under_slurm(environment: MutableMapping[str, str]) -> None:
    """Set MASTER_ADDR and MASTER_PORT, where they are not, from what srun tells every task of a step alike.

    Tasks of one node meet on its loopback interface, others on the first node of the step, where rank 0 is.
    """
    if "RANK" in environment or "SLURM_PROCID" not in environment:
        return
    nodes = _of_step(environment, "NODELIST")
    alone = _of_step(environment, "NUM_NODES") == "1"
    environment.setdefault("MASTER_ADDR", "127.0.0.1" if alone or nodes is None else first_host(nodes))
    if (job := environment.get("SLURM_JOB_ID")) is not None:
        environment.setdefault("MASTER_PORT", str(_FIRST_PORT + int(job) % _PORTS))


def first_host(nodes: str) -> str:
    """The first name of a Slurm host list: `gpu007` of `gpu[007-012,020],login1`."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    if first is None:
        raise RequestError(f"the host list '{nodes}' names no host; set MASTER_ADDR")
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first.group())


def _slurm_local_workers(environment: Mapping[str, str]) -> int:
    """Tasks on this node: the entry SLURM_NODEID of a list such as `2(x3),1`: two on each of three, then one."""
    tasks = _of_step(environment, "TASKS_PER_NODE")
    if tasks is None:
        return 1
    counts: list[int] = []
    for entry in tasks.split(","):
        count, _, times = entry.rstrip(")").partition("(x")
        counts += [int(count)] * int(times or 1)
    return counts[int(environment.get("SLURM_NODEID", "0"))]


def _of_step(environment: Mapping[str, str], name: str) -> str | None:
    """A variable of the step, which may have fewer nodes and tasks than its job; else the job's."""
    job = {"NODELIST": "SLURM_JOB_NODELIST", "NUM_NODES": "SLURM_JOB_NUM_NODES"}.get(name, f"SLURM_{name}")
    return environment.get(f"SLURM_STEP_{name}", environment.get(job))
