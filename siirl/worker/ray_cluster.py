"""The Ray launcher: an actor per worker, placed where the devices are, runs the worker as a process of its own.

Ray places the workers and tells how they ended. Tensors and metrics do not pass through it: workers meet at
MASTER_ADDR and write to the run directory as under every other launcher.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from siirl.config.schema import Config
from siirl.device.backend import Backend, Role
from siirl.device.selection import HOST, VARIABLE, backend_class, names
from siirl.errors import DeviceError, RequestError, SiirlError
from siirl.worker.place import Place
from siirl.worker.processes import (
    device_role,
    free_port,
    start_process,
    supervise,
    worker_environment,
    write_error,
)

# Ray's names for what an actor's arguments of these names ask for.
_RESOURCES = {"num_cpus": "CPU", "num_gpus": "GPU"}
_ANSWER_S = 10.0


@contextmanager
def connected() -> Iterator[None]:
    """With a Ray cluster: the one this process uses, that of RAY_ADDRESS, one of this machine, or a new one here.

    Raises:
        RequestError: the cluster that RAY_ADDRESS or a file of Ray's names does not answer.
    """
    if ray.is_initialized():
        yield
        return
    _check_address()
    before = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
    except ConnectionError as error:
        raise RequestError(f"the Ray cluster cannot be used: {str(error).strip().splitlines()[0]}") from error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)  # Ray's own handler exits with the signal's number as status
    try:
        yield
    finally:
        ray.shutdown()


def _check_address() -> None:
    """Refuse a cluster that is gone, for which Ray would wait a quarter of an hour."""
    file = Path(os.environ.get("RAY_TMPDIR", "/tmp"), "ray", "ray_current_cluster")
    source, address = "RAY_ADDRESS", os.environ.get("RAY_ADDRESS", "")
    if address in ("", "auto") and file.is_file():
        source, address = str(file), file.read_text().strip()
    if "://" in address:
        raise RequestError(
            f"{source} is {address}, an address of Ray's client: start siirl on a node of the cluster, "
            "or by `ray job submit`"
        )
    host, _, port = address.rpartition(":")
    if not port.isdigit():
        return  # none, or one of Ray's other forms
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_S).close()
    except OSError as error:
        raise RequestError(
            f"no Ray cluster answers at {address}, which {source} names ({error}): "
            "set RAY_ADDRESS to one that runs, or to 'local' for one on this machine alone"
        ) from error


def choose_backend(cli: str | None, configured: str) -> Backend:
    """The back end named, else the one whose resource the cluster has; this machine may have no device.

    Raises:
        RequestError: the name is unknown, or the cluster has devices of several kinds.
    """
    name = cli or os.environ.get(VARIABLE) or configured
    if name != "auto":
        return backend_class(name)()
    there = ray.cluster_resources()
    accelerators = [backend for backend in map(backend_class, names()) if backend.is_accelerator()]
    usable = [backend for backend in accelerators if all(there.get(key, 0) >= n for key, n in _bundle(backend).items())]
    if len(usable) > 1:
        kinds = ", ".join(backend.name for backend in usable)
        raise RequestError(f"the Ray cluster's resources fit devices of several kinds, choose with --device: {kinds}")
    return usable[0]() if usable else backend_class(HOST)()


@contextmanager
def reserved(backend: Backend, config: Config) -> Iterator[PlacementGroup]:
    """With a core and a device for each worker, on as few nodes as possible.

    Raises:
        DeviceError: the cluster is too small, or what it has is not free within `timeout_s`.
    """
    bundle = _bundle(type(backend))
    _check_room(backend.name, bundle, config.workers)
    group = placement_group([bundle] * config.workers, strategy="PACK")
    try:
        if not group.wait(config.timeout_s):
            free = ray.available_resources()
            raise DeviceError(
                f"the Ray cluster had no room for {config.workers} workers within {config.timeout_s:g} s (timeout_s): "
                f"each needs {_words(bundle)}, and {_words({name: free.get(name, 0) for name in bundle})} is free"
            )
        yield group
    finally:
        remove_placement_group(group)


def run_actors(group: PlacementGroup, directory: Path, config: Config, backend: Backend, resume: bool) -> None:
    """Run ``config.workers`` workers in what is reserved; raises as `siirl.worker.processes.supervise` does."""
    options = {"num_cpus": 1, **backend.launcher_resources(1), "max_concurrency": 2}
    there = [PlacementGroupSchedulingStrategy(group, bundle) for bundle in range(config.workers)]
    seats: list[Any] = [
        ray.remote(Seat).options(**options, scheduling_strategy=strategy).remote() for strategy in there
    ]
    needed = (str(directory / "config.yaml"), os.getcwd())
    try:
        sites = ray.get([seat.look.remote(backend.name, needed) for seat in seats], timeout=config.timeout_s)
    except RayError as error:
        cause = str(error).strip().splitlines()[-1]
        raise SiirlError(f"a Ray actor did not start; siirl has to be installed on every node ({cause})") from error
    for site in sites:
        if site.missing:
            raise RequestError(
                f"node {site.address} of the Ray cluster does not see {site.missing}: the run directory and the "
                "directory that siirl is started from lie on storage that all nodes share"
            )

    def start() -> list[RayProcess]:
        workers, first = [], sites[0]  # of rank 0, for ranks begin on its node
        for index, place, variables in _arrange(sites, type(backend).visible_devices_env()):
            address = "127.0.0.1" if place.workers == place.local_workers else first.address
            threads, role = config.threads_per_worker, device_role(config)
            request = Request(backend.name, place, address, first.port, variables, threads, role)
            result = seats[index].run.remote(request, str(directory), os.getcwd(), resume)
            workers.append(RayProcess(seats[index], result, sites[index].address, directory, place.rank))
        return workers

    supervise(directory, start)


@dataclass(frozen=True)
class Site:
    """What an actor finds where it is: its node, the devices Ray gives it, a free port, what it does not see."""

    node: str
    address: str
    devices: str | None
    port: int
    missing: str | None


@dataclass(frozen=True)
class Request:
    """The worker an actor is to run; `variables` are added to its environment."""

    device: str
    place: Place
    address: str
    port: int
    variables: Mapping[str, str]
    threads: int | None
    role: Role


class Seat:
    """The actor: holds a worker's resources and runs it as a process, which ends and takes signals as elsewhere."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def look(self, device: str, needed: Sequence[str]) -> Site:
        """Describe the place; `needed` are paths that have to exist."""
        return Site(
            node=ray.get_runtime_context().get_node_id(),
            address=ray.util.get_node_ip_address(),
            devices=os.environ.get(backend_class(device).visible_devices_env()),
            port=free_port(""),
            missing=next((path for path in needed if not Path(path).exists()), None),
        )

    def run(self, request: Request, directory: str, cwd: str, resume: bool) -> int:
        """Run the worker to its end; its exit status, or minus the number of the signal that ended it."""
        backend = backend_class(request.device)()
        environment = worker_environment(
            backend, request.place, request.address, request.port, request.threads, request.role
        )
        self._process = start_process(Path(directory), {**environment, **request.variables}, resume, cwd)
        return self._process.wait()

    def send_signal(self, number: int) -> None:
        if self._process is not None:
            self._process.send_signal(number)


class RayProcess:
    """A worker in an actor, as `supervise` sees a process."""

    def __init__(self, seat: Any, result: Any, address: str, directory: Path, rank: int) -> None:
        self.returncode: int | None = None
        self._seat, self._result, self._address = seat, result, address
        self._directory, self._rank = directory, rank

    def poll(self) -> int | None:
        if self.returncode is None and ray.wait([self._result], timeout=0)[0]:
            self.returncode = self.wait()
        return self.returncode

    def wait(self) -> int:
        if self.returncode is not None:
            return self.returncode
        try:
            self.returncode = ray.get(self._result)
        except RayActorError:
            self.returncode = -signal.SIGKILL  # which is what it came to, and the cause of what the others say
            write_error(self._directory, self._rank, f"Ray lost the actor that ran it, or all of node {self._address}")
        return self.returncode

    def send_signal(self, number: int, /) -> None:
        self._seat.send_signal.remote(number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _arrange(sites: Sequence[Site], variable: str) -> Iterator[tuple[int, Place, dict[str, str]]]:
    """Each actor's index, its worker's place and variables, in the order of ranks: those of one node follow another.

    Ray shows each actor its own devices alone. Workers of a node see those of all of them, in the order of their local
    ranks, for libraries find the way between two devices of a node by what both processes see.
    """
    nodes: dict[str, list[int]] = {}
    for index, site in enumerate(sites):
        nodes.setdefault(site.node, []).append(index)
    rank = 0
    for members in nodes.values():
        devices = [sites[index].devices for index in members]
        shown = {variable: ",".join(filter(None, devices))} if variable and all(devices) else {}
        for local_rank, index in enumerate(members):
            yield index, Place(rank, len(sites), local_rank, len(members)), shown
            rank += 1


def _bundle(backend: type[Backend]) -> dict[str, float]:
    """What Ray reserves for one worker, by resource: a core and a device."""
    wanted = backend.launcher_resources(1)
    named = {name: wanted[argument] for argument, name in _RESOURCES.items() if argument in wanted}
    return {"CPU": 1, **named, **wanted.get("resources", {})}


def _check_room(device: str, bundle: Mapping[str, float], workers: int) -> None:
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    room = sum(min(int(node.get(name, 0) // amount) for name, amount in bundle.items()) for node in nodes)
    if room < workers:
        total = {name: sum(node.get(name, 0) for node in nodes) for name in bundle}
        raise DeviceError(
            f"the Ray cluster has room for {room} workers on device '{device}', not for {workers}: each needs "
            f"{_words(bundle)}, its {len(nodes)} nodes have {_words(total)} in all; set --workers, or add nodes"
        )


def _words(resources: Mapping[str, float]) -> str:
    return " and ".join(f"{amount:g} {name}" for name, amount in resources.items())
