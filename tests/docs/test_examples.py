"""Every example of extend.md runs, and what it computes reaches the update."""

from __future__ import annotations

import json
import re
import statistics
import tomllib
from pathlib import Path
from typing import get_args

import pytest
import torch

import siirl_kernels
from siirl.device import Role, TorchBackend
from siirl.validation.checks import all_checks
from siirl.validation.expected import read_expected
from tests.device.distribution import install, python
from tests.docs.conftest import RECIPE, Finished, run_example
from tests.docs.pages import ROOT, blocks, code, table_cells

EXAMPLES = ROOT / "docs" / "examples"
ACME = EXAMPLES / "siirl-acme"
STEPS = (1, 2)


def credit(response: str, answer: str) -> float:
    """The reward of the recipe, where digits count for a half."""
    right = [i for i in range(min(len(response), len(answer))) if response[i] == answer[i]]
    digits = [c for c in response if c in "0123456789"]
    return 0.5 * len(right) / len(answer) + 0.5 * (len(digits) / len(response) if response else 0)


def by_group(columns: dict[str, list], name: str) -> dict[int, list[float]]:
    groups: dict[int, list[float]] = {}
    for group, value in zip(columns["group_id"], columns[name], strict=True):
        groups.setdefault(group, []).append(value)
    return groups


@pytest.mark.parametrize("step", STEPS)
def test_the_reward_scores_every_sample(example: Finished, step: int) -> None:
    samples = example.samples(step)
    assert [s["reward"] for s in samples] == pytest.approx([credit(s["response"], s["answer"]) for s in samples])
    rewards = [s["reward"] for s in samples]
    assert example.metrics[step - 1]["reward/mean"] == pytest.approx(statistics.mean(rewards), rel=1e-6)
    assert max(rewards) > 0


@pytest.mark.parametrize("step", STEPS)
def test_the_filter_keeps_the_groups_within_reach(example: Finished, step: int) -> None:
    samples = example.samples(step)
    groups: dict[int, list[dict]] = {}
    for sample in samples:
        groups.setdefault(sample["sample_id"] >> 20, []).append(sample)
    kept = [s for g in groups.values() if 0.05 < statistics.mean(s["reward"] for s in g) < 0.95 for s in g]
    assert sorted(example.columns(step)["sample_id"]) == sorted(s["sample_id"] for s in kept)
    assert 0 < len(kept) < len(samples)
    assert example.metrics[step - 1]["data/kept_fraction"] == len(kept) / len(samples)


@pytest.mark.parametrize("step", STEPS)
def test_the_node_charges_every_token(example: Finished, step: int) -> None:
    columns = example.columns(step)
    expected = [r - 0.01 * len(ids) for r, ids in zip(columns["reward"], columns["response_ids"], strict=True)]
    assert columns["shaped_reward"] == pytest.approx(expected)
    assert example.metrics[step - 1]["reward/shaped_mean"] == pytest.approx(statistics.mean(expected), rel=1e-6)


@pytest.mark.parametrize("step", STEPS)
def test_the_advantage_leaves_one_out(example: Finished, step: int) -> None:
    columns = example.columns(step)
    groups = by_group(columns, "shaped_reward")
    for group, reward, advantages in zip(
        columns["group_id"], columns["shaped_reward"], columns["advantages"], strict=True
    ):
        others = (sum(groups[group]) - reward) / (len(groups[group]) - 1)
        assert advantages == pytest.approx([reward - others] * len(advantages), abs=1e-6)


@pytest.mark.parametrize("step", STEPS)
def test_the_loss_is_the_log_prob_times_the_advantage(example: Finished, step: int) -> None:
    """With one update a step the ratio is 1, and what is left of CISPO is the policy gradient of REINFORCE."""
    columns = example.columns(step)
    rows = [
        statistics.mean(-a * lp for a, lp in zip(advantages, log_probs, strict=True))
        for advantages, log_probs in zip(columns["advantages"], columns["rollout_log_probs"], strict=True)
    ]
    assert example.metrics[step - 1]["actor/loss"] == pytest.approx(statistics.mean(rows), rel=1e-4)


def test_the_built_in_loss_gives_another_number(example: Finished, tmp_path: Path) -> None:
    plain = run_example(tmp_path, algorithm__policy_loss="ppo_clip", training__steps=1)
    advantages = [statistics.mean(row) for row in plain.columns(1)["advantages"]]
    assert plain.metrics[0]["actor/loss"] == pytest.approx(-statistics.mean(advantages), abs=1e-7)
    assert plain.metrics[0]["actor/loss"] != pytest.approx(example.metrics[0]["actor/loss"], rel=0.1)


def test_the_clip_of_the_example_stops_at_its_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ratios 2, 1 and 1/2 with bounds 0.2: weights 1.2, 1 and 0.8, and the gradient of each token is -weight · A."""
    monkeypatch.syspath_prepend(EXAMPLES)
    from cispo import cispo

    from siirl.algorithms.policy_losses import PolicyLossInput
    from siirl.config import Config

    new = torch.tensor([0.5, 0.5, 0.25]).log().requires_grad_()
    old = torch.tensor([0.25, 0.5, 0.5]).log()
    advantages = torch.tensor([1.0, -2.0, 3.0])
    loss, stats = cispo(PolicyLossInput(new, old, advantages, torch.tensor([0, 3])), Config().algorithm)
    loss.sum().backward()
    assert new.grad is not None
    assert new.grad.tolist() == pytest.approx([-1.2, 2.0, -2.4])
    assert stats["ratio"].tolist() == pytest.approx([2.0, 1.0, 0.5])
    assert stats["clipped"].tolist() == [1.0, 0.0, 1.0]


def test_the_examples_do_not_depend_on_the_number_of_workers(example: Finished, tmp_path: Path) -> None:
    two = run_example(tmp_path, workers=2, training__steps=1)
    assert sorted(two.columns(1)["sample_id"]) == sorted(example.columns(1)["sample_id"])
    for key, value in example.metrics[0].items():
        if key.split("/")[0] in ("reward", "data", "response", "actor"):
            assert two.metrics[0][key] == pytest.approx(value, rel=1e-4, abs=1e-6), key


def test_the_kernel_computes_what_the_reference_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ACME)
    import siirl_acme.kernels

    try:
        assert siirl_kernels.bind(["acme", "torch"]) == dict.fromkeys(siirl_kernels.resolved(), "torch") | {
            "swiglu": "acme"
        }
    finally:
        siirl_kernels.bind(["torch"])
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(5, 7, generator=generator, requires_grad=True) for _ in range(2)]
    results = []
    for function in (siirl_kernels.providers("swiglu")["torch"], siirl_acme.kernels.swiglu):
        out = function(*inputs)
        results.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
    for expected, given in zip(*results, strict=True):
        torch.testing.assert_close(given, expected)


@pytest.fixture
def acme(tmp_path: Path) -> tuple[Path, Path]:
    """The example's package installed with the entry points of its project file."""
    groups = tomllib.loads((ACME / "pyproject.toml").read_text())["project"]["entry-points"]
    return install(tmp_path, "siirl-acme", entry_points=groups), ACME


def test_the_table_lists_what_a_back_end_adds() -> None:
    listed = [name for cell in table_cells("docs/vendors.md", "## 3. The seven methods") for name in code(cell)]
    assert sorted(name.partition("(")[0] for name in listed) == sorted(TorchBackend.__abstractmethods__)
    assert len(listed) == 7


def test_the_page_names_what_a_back_end_may_override() -> None:
    listed = [code(cell)[0] for cell in table_cells("docs/vendors.md", "## 4. What else may differ")]
    names = [re.match(r"\w+", name)[0] for name in listed]  # type: ignore[index]
    assert {"CommSpec"} == {name for name in names if not hasattr(TorchBackend, name)}
    page = (ROOT / "docs" / "vendors.md").read_text()
    assert all(f"`{role}`" in page for role in get_args(Role))


def test_the_expected_failures_of_the_page_are_accepted(tmp_path: Path) -> None:
    (block,) = blocks("toml", "expected failures")
    (tmp_path / "expected_failures.toml").write_text(block.text)
    (entry,) = read_expected(tmp_path / "expected_failures.toml")
    ids = {f"{check.level}.{check.name}" for check in all_checks()}
    assert entry.check in ids
    page = (ROOT / "docs" / "vendors.md").read_text()
    assert {name.partition("[")[0] for name in re.findall(r"`(L\d\.\w+[^`]*)`", page)} <= ids


def test_doctor_lists_the_example_back_ends(acme: tuple[Path, Path]) -> None:
    done = python("from siirl.cli.main import main; main(['doctor', '--json'])", *acme)
    devices = json.loads(done.stdout)["devices"]
    assert devices["acme-host"]["available"]
    assert devices["acme"]["problems"] == [
        "the package torch-acme is not installed",
        "no Acme device is present (no /dev/acme0)",
    ]


def test_the_example_device_is_refused_with_its_reasons(acme: tuple[Path, Path]) -> None:
    done = python("from siirl.cli.main import main; main(['train', 'quickstart', '--device', 'acme'])", *acme)
    assert done.returncode == 3
    assert done.stderr == (
        "siirl: error: device 'acme' is not usable here: the package torch-acme is not installed; no Acme device is "
        "present (no /dev/acme0). What helps: pip install torch-acme; check the driver with acme-info\n"
    )


def test_the_example_answers_without_pytorch(acme: tuple[Path, Path]) -> None:
    code = (
        "import sys; from siirl_acme import AcmeBackend; back_end = AcmeBackend();"
        "back_end.communication(); assert back_end.kernel_order()[-1] == 'torch';"
        "sys.exit('torch' in sys.modules)"
    )
    done = python(code, *acme)
    assert done.returncode == 0, done.stderr


def test_a_run_on_the_example_back_end_uses_its_kernel(acme: tuple[Path, Path], tmp_path: Path) -> None:
    arguments = ["train", str(ROOT / RECIPE), "--device", "acme-host", "--run-dir", str(tmp_path / "run")]
    code = f"import os; os.chdir({str(ROOT)!r}); from siirl.cli.main import main; main({arguments!r})"
    done = python(code, *acme)
    assert done.returncode == 0, done.stderr
    assert "'swiglu': 'acme > native'" in (tmp_path / "run" / "logs" / "worker_000.log").read_text()
