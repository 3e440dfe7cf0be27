"""The kernels of a run: tried when it starts, the same on all workers, on record."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from siirl_kernels import table_hash
from tests.worker import runs

# A package whose kernel is right on worker 0 and wrong on the others, as one built for another CPU may be.
KERNEL = """
import os

import siirl_kernels.native  # whose place it takes
from siirl.dag import register_op
from siirl_kernels import implementation, providers

EVERYWHERE = WHERE


@implementation("swiglu", "native")
def swiglu(gate, up):
    out = providers("swiglu")["torch"](gate, up)
    return 1.01 * out if EVERYWHERE or os.environ.get("RANK") == "1" else out


@register_op("watch", reads=["response_ids"], observes=True)
def watch(batch, context):
    pass
"""
NODE = "  - {id: watch, op: watch, layout: groups, after: [advantage], reads: [response_ids]}\n\n"


def recipe(folder: Path, everywhere: bool, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Its pipeline has a node of an installed package, which brings a kernel with it."""
    (folder / "bringing.py").write_text(KERNEL.replace("WHERE", str(everywhere)))
    facts = folder / "bringing-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: bringing\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text("[siirl.ops]\nwatch = bringing\n")
    monkeypatch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    plain = Path("configs/pipelines/grpo.yaml").read_text()
    (folder / "watched.yaml").write_text(plain.replace("  - id: samples\n", f"{NODE}  - id: samples\n"))
    return runs.write_recipe(folder)


def test_a_kernel_that_is_wrong_on_one_worker_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = recipe(tmp_path, False, monkeypatch)
    said = runs.run(made, tmp_path / "run", "pipeline=watched.yaml", "--workers", "2", status=1)
    assert "worker 0 computes the kernel op 'swiglu' by 'native' and worker 1 by 'torch': " in said
    assert "Traceback" not in said and not (tmp_path / "run" / "metrics.jsonl").exists()
    log = (tmp_path / "run" / "logs" / "worker_001.log").read_text()
    assert log.count("the kernel op 'swiglu' is not computed by 'native', which fails its self-test: case") == 1


def test_a_kernel_that_is_wrong_everywhere_is_replaced_and_on_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = recipe(tmp_path, True, monkeypatch)
    runs.run(made, tmp_path / "run", "pipeline=watched.yaml", "training.steps=1")
    record = json.loads((tmp_path / "run" / "kernels.json").read_text())
    assert record["bound"]["swiglu"] == "torch" and len(record["hash"]) == len(table_hash())
    (failed,) = record["failed"]
    assert (failed["op"], failed["provider"]) == ("swiglu", "native") and "is off by" in failed["why"]
