"""The kernels of a run: chosen by every worker for itself, tried, the same on all of them, on record."""

from __future__ import annotations

import json
from pathlib import Path

from siirl.config.schema import Config
from siirl.device.backend import Backend
from siirl.device.collectives import Collectives
from siirl.errors import RequestError, SiirlError
from siirl_kernels import resolved, table_hash
from siirl_kernels.invariant import invariant_pins
from siirl_kernels.selftest import bind_tested, failures


def bind_kernels(backend: Backend, config: Config, world: Collectives, run_dir: Path) -> dict[str, str]:
    """Bind this worker's kernels and make sure that all workers have the same; worker 0 writes ``kernels.json``.

    Returns:
        The provider of each op.

    Raises:
        RequestError: the configuration asks for kernels that this machine cannot have.
        SiirlError: workers have bound different ones.
    """
    bound = _bind(backend, config)
    require_alike(world)
    if world.rank == 0:
        left_out = [{"op": op, "provider": by, "why": why} for (op, by), why in sorted(failures().items())]
        record = {"hash": table_hash(), "bound": bound, "failed": left_out}
        (run_dir / "kernels.json").write_text(json.dumps(record, indent=1) + "\n")
    return bound


def _bind(backend: Backend, config: Config) -> dict[str, str]:
    device = backend.device()
    if not config.rollout.batch_invariant:
        return bind_tested(backend.kernel_order(), device=device)
    key = "rollout.batch_invariant"
    if device.type != "cpu":
        raise RequestError(f"{key} needs the device cpu, not {device.type}; set {key}=false")
    try:
        return bind_tested(backend.kernel_order(), invariant_pins(), device)
    except ValueError as error:
        raise RequestError(f"{key}: {error}") from None


def require_alike(world: Collectives) -> None:
    """Raise on every worker unless all have bound the same kernels. A collective.

    Sixteen bytes of each worker go round; only where they differ the tables do.
    """
    if len(set(world.all_gather_bytes(table_hash().encode()))) == 1:
        return
    first, *others = (json.loads(table) for table in world.all_gather_bytes(json.dumps(resolved()).encode()))
    for rank, table in enumerate(others, start=1):
        for op in sorted(first.keys() | table.keys()):
            here, there = first.get(op), table.get(op)
            if here != there:
                raise SiirlError(
                    f"worker 0 computes the kernel op '{op}' by '{here}' and worker {rank} by '{there}': workers that "
                    "compute with different kernels drift apart; their logs say why they chose these"
                )
