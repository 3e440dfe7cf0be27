"""Saving and loading a run's state.

A checkpoint is a directory ``checkpoints/step_000010``: tensors in safetensors files through
``torch.distributed.checkpoint`` (each worker writes its share, any number of workers reads them back), JSON for the
rest, and ``manifest.json`` with a checksum per file. It is written beside its place and renamed when it is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from siirl.device.collectives import Collectives
from siirl.errors import SiirlError

MANIFEST = "manifest.json"
_STATE = "state.json"


def directory_name(stage: str, step: int) -> str:
    """``step_000010``, or ``warmup.0_step_000010`` within a warm-up."""
    return f"step_{step:06d}" if stage == "main" else f"{stage}_step_{step:06d}"


def save(
    run_dir: Path,
    name: str,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    worker_state: Mapping[str, Any],
    collectives: Collectives,
    *,
    holders: Collectives | None = None,
    worker_tensors: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write one checkpoint; every worker calls this together.

    Args:
        run_dir: of the run.
        name: of the checkpoint's directory.
        tensors: by name; sharded tensors are written by the workers that hold them, others once.
        state: JSON, the same on every worker; ``order`` (a list that sorts checkpoints) is required.
        worker_state: JSON of this worker alone.
        collectives: of all workers.
        holders: of the workers that have tensors; default: all. A worker without tensors is none of them.
        worker_tensors: of this worker alone; no file is written without any.

    Returns:
        The checkpoint's directory.
    """
    target = run_dir / "checkpoints" / name
    partial = target.with_name(f".{name}.partial")
    if collectives.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        (partial / "tensors").mkdir(parents=True)
    import torch.distributed.checkpoint as dcp  # two seconds to import

    collectives.barrier()
    if tensors:
        group = collectives if holders is None else holders
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch names its own deprecated parts
            writer = dcp.HuggingFaceStorageWriter(str(partial / "tensors"), save_distributed=True)
            dcp.save(dict(tensors), storage_writer=writer, process_group=group.group, no_dist=group.size == 1)
    _write_json(partial / f"worker_{collectives.rank:03d}.json", worker_state)
    if worker_tensors:
        _write(partial / f"worker_{collectives.rank:03d}.safetensors", safetensors.torch.save(dict(worker_tensors)))
    collectives.barrier()
    if collectives.rank == 0:
        _write_json(partial / _STATE, {**state, "workers": collectives.size})
        files = sorted(p for p in partial.rglob("*") if p.is_file())
        sums = {str(p.relative_to(partial)): {"bytes": p.stat().st_size, "sha256": _sha256(p)} for p in files}
        _write_json(partial / MANIFEST, {"version": 1, "order": state["order"], "files": sums})
        shutil.rmtree(target, ignore_errors=True)
        os.rename(partial, target)
        _sync(target.parent)
    collectives.barrier()
    return target


def load_state(checkpoint: Path) -> dict[str, Any]:
    """The JSON state of a checkpoint, after its files were checked against the manifest.

    Raises:
        SiirlError: a file is missing, truncated or changed.
    """
    for name, facts in json.loads((checkpoint / MANIFEST).read_text())["files"].items():
        path = checkpoint / name
        if not path.is_file() or path.stat().st_size != facts["bytes"] or _sha256(path) != facts["sha256"]:
            raise SiirlError(
                f"{path}: the file is damaged or missing; remove {checkpoint} to resume from the one before"
            )
    return json.loads((checkpoint / _STATE).read_text())


def load_worker_state(checkpoint: Path, rank: int) -> dict[str, Any] | None:
    """The state that worker ``rank`` saved, None when the run had fewer workers."""
    path = checkpoint / f"worker_{rank:03d}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def load_worker_tensors(checkpoint: Path, rank: int) -> dict[str, Tensor]:
    """The tensors that worker ``rank`` saved for itself."""
    path = checkpoint / f"worker_{rank:03d}.safetensors"
    return safetensors.torch.load_file(path) if path.is_file() else {}


def load_tensors(checkpoint: Path, tensors: Mapping[str, Tensor], collectives: Collectives) -> None:
    """Fill ``tensors`` in place, whatever number of workers wrote the checkpoint; ``collectives``: of their holders."""
    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reader = dcp.HuggingFaceStorageReader(str(checkpoint / "tensors"))
        group = collectives.group
        dcp.load(dict(tensors), storage_reader=reader, process_group=group, no_dist=collectives.size == 1)


def checkpoints(run_dir: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    found = [p.parent for p in (run_dir / "checkpoints").glob(f"*/{MANIFEST}")]
    return sorted(found, key=lambda p: json.loads((p / MANIFEST).read_text())["order"])


def prune(run_dir: Path, keep: int) -> None:
    """Remove all but the newest ``keep`` checkpoints."""
    for old in checkpoints(run_dir)[:-keep]:
        shutil.rmtree(old)


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    _write(path, json.dumps(data, indent=1).encode())


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
