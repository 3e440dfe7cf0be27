"""The suite's tests of kernels, models and engines on the simulated device, and that they find mixed-device bugs."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.npu.conftest import run_inside

# Of updates by several workers one is run: the others differ in who has which row.
ONE_WORLD = "not empty and not three and not even-replicate"


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ("tests/kernels/test_contracts.py",),
        ("tests/model/test_parity.py",),
        ("tests/rollout/test_engine.py",),
        ("tests/rollout/test_graphs.py", "-k", "not mistakes"),
        ("tests/training/test_updates.py", "-k", ONE_WORLD),
    ],
    ids=lambda arguments: Path(arguments[0]).stem,
)
def test_what_passes_on_the_host_passes_on_the_device(arguments: tuple[str, ...], npu: None) -> None:
    done = run_inside(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout and "skipped" not in done.stdout


@dataclass(frozen=True)
class Planted:
    """A bug that a host does not feel.

    Attributes:
        patch: code that plants it, as a pytest plugin.
        test: the test of the suite that meets it.
        message: what the device says.
    """

    patch: str
    test: str
    message: str


BUGS = {
    "a host tensor left in the update": Planted(
        """
import dataclasses
from siirl.training import fsdp
pack = fsdp.pack
def forgetful(batch, rows, device):
    micro = pack(batch, rows, device)
    return dataclasses.replace(micro, targets_R=micro.targets_R.cpu())
fsdp.pack = forgetful
""",
        "tests/training/test_updates.py::test_a_failed_sample_does_not_move_the_weights",
        "Expected all tensors to be on the same device, but found at least two devices, npu:0 and cpu!",
    ),
    "numpy() of a device tensor": Planted(
        """
import torch
from siirl.rollout import sampler
draw = sampler.draw
def through_numpy(*arguments):
    tokens, log_probs = draw(*arguments)
    return torch.from_numpy(tokens.numpy()), log_probs
sampler.draw = through_numpy
""",
        "tests/rollout/test_engine.py::test_stop_strings_end_a_response",
        "TypeError: can't convert npu:0 device type tensor to numpy",
    ),
    "an index on the wrong device": Planted(
        """
from siirl_kernels.packing import PackedSequences
whole = PackedSequences.whole.func
PackedSequences.whole = property(lambda self: None if whole(self) is None else whole(self).cpu())
""",
        "tests/training/test_updates.py::test_a_failed_sample_does_not_move_the_weights",
        "(when calling aten::index_select)",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("bug", BUGS.values(), ids=BUGS.keys())
def test_a_planted_bug_is_found_on_the_device_alone(bug: Planted, npu: None, tmp_path: Path) -> None:
    (tmp_path / "planted.py").write_text(bug.patch)
    search = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ['PYTHONPATH']}"}
    host = run_inside(bug.test, "-p", "planted", device="cpu", **search)
    assert host.returncode == 0, host.stdout + host.stderr
    device = run_inside(bug.test, "-p", "planted", device="npu", **search)
    assert device.returncode == 1
    assert bug.message in device.stdout, device.stdout
