"""`siirl validate` as a vendor starts it, and the checks through pytest."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from siirl.device import RngState, select
from siirl.errors import RequestError
from siirl.validation import golden
from siirl.validation.report import read_report
from siirl.validation.run import prepared, run, validate
from siirl_cpu import CpuBackend
from tests.device.distribution import install

VENDOR = """
from siirl_cpu import CpuBackend

class Forgetful(CpuBackend):
    name = "forgetful"
    def set_rng_state(self, state):
        if state.backend != self.name:
            super().set_rng_state(state)
"""
KNOWN = """
[[expected]]
check = "L1.{check}"
reason = "its generator cannot be set"
url = "https://example.org/issues/3"
expires = {expires}
"""


@pytest.fixture
def vendor(tmp_path: Path) -> Path:
    """A vendor's package, whose device forgets its random state."""
    modules = {"forgetful/__init__.py": VENDOR}
    return install(
        tmp_path, "forgetful", modules=modules, entry_points={"siirl.backends": {"forgetful": "forgetful:Forgetful"}}
    )


def siirl(*arguments: str | Path, path: Path | None = None, module: str = "siirl") -> subprocess.CompletedProcess[str]:
    search = [*([str(path)] if path else []), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {key: value for key, value in os.environ.items() if key != "SIIRL_DEVICE"}
    environment |= {"PYTHONPATH": os.pathsep.join(search)}
    command = [sys.executable, "-m", module, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)


@pytest.mark.slow
def test_the_cpu_keeps_every_promise(tmp_path: Path) -> None:
    done = siirl("validate", "--device", "cpu", "--report", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert max(len(line) for line in lines if not line.startswith("report: ")) <= 80
    report = read_report(tmp_path / "report.json")
    assert lines[-1] == report.verdict()
    assert report.levels() == ["L0", "L1", "L2", "L3", "L4", "L5"]
    assert not report.failures
    assert {"torch", "siirl", "python"} <= report.versions.keys()
    assert report.kernels["bound"]["linear"] == "torch"
    cases = list(ElementTree.parse(tmp_path / "junit.xml").getroot().iter("testcase"))
    assert [case.get("name") for case in cases] == [result.id for result in report.results]
    page = (tmp_path / "report.html").read_text()
    assert all(f'id="{level}"' in page for level in report.levels())
    limits = [each for result in report.results for each in result.measurements if each.limit is not None]
    assert len(limits) > 100
    assert all(each.value <= each.limit for each in limits)


def test_a_broken_promise_is_exit_4_and_the_last_line_names_it(vendor: Path, tmp_path: Path) -> None:
    done = siirl("validate", "--device", "forgetful", "--only", "L1.rng*", "--report", tmp_path / "r", path=vendor)
    assert done.returncode == 4, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("siirl: error: device 'forgetful' breaks a promise of L1, device semantics: a random state")
    assert "(L1.rng_round_trip)" in last
    failed = [
        r["id"] for r in json.loads((tmp_path / "r" / "report.json").read_text())["results"] if r["status"] == "failed"
    ]
    assert failed == ["L1.rng_round_trip"]


class Forgetful(CpuBackend):
    """The vendor's device in this process, with a file of what is known of it."""

    known: Path

    def set_rng_state(self, state: RngState) -> None:
        pass

    @classmethod
    def expected_failures(cls) -> Path:
        return cls.known


@pytest.mark.parametrize(
    ("check", "expires", "asked", "says"),
    [
        ("rng_round_trip", "2999-01-01", "L1.rng_round_trip", None),
        ("rng_round_trip", "2001-01-01", "L1.rng_round_trip", "expired on 2001-01-01"),
        ("rng_isolation", "2999-01-01", "L1.rng_isolation", "passes, but is expected to fail"),
        ("rng_roundtrip", "2999-01-01", "L0.expected_failures", "there is no check L1.rng_roundtrip"),
    ],
)
def test_what_a_vendor_knows(check: str, expires: str, asked: str, says: str | None, tmp_path: Path) -> None:
    Forgetful.known = tmp_path / "known.toml"
    Forgetful.known.write_text(KNOWN.format(check=check, expires=expires))
    backend = Forgetful()
    backend.load()
    with prepared(backend, "smoke") as subject:
        report = validate(subject, [asked])
    if says is None:
        assert not report.failures
        assert report.verdict() == "device 'cpu' keeps 0 of 1 promises (1 known to differ)"
    else:
        assert says in report.verdict()


def test_the_file_of_known_failures_lies_beside_the_back_end(vendor: Path) -> None:
    (vendor / "forgetful" / "expected_failures.toml").write_text(
        KNOWN.format(check="rng_round_trip", expires="2999-01-01")
    )
    done = siirl("validate", "--device", "forgetful", "--only", "L1.rng*", path=vendor)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "device 'forgetful' keeps 1 of 2 promises (1 known to differ)"


def test_two_reports_are_compared(tmp_path: Path) -> None:
    report = run("cpu", "smoke", tmp_path / "a", only=["L2.accuracy[rope-torch*", "L0.probe"])
    assert len(report.results) == 4
    other = json.loads((tmp_path / "a" / "report.json").read_text())
    (tmp_path / "b.json").write_text(json.dumps(other))
    same = siirl("validate", "--compare", tmp_path / "a" / "report.json", tmp_path / "b.json")
    assert (same.returncode, same.stdout) == (0, "nothing changed\n")
    other["results"][0] |= {"status": "failed", "sentence": "it hides"}
    (tmp_path / "b.json").write_text(json.dumps(other))
    worse = siirl("validate", "--compare", tmp_path / "a" / "report.json", tmp_path / "b.json")
    assert worse.returncode == 4
    assert "L0.probe: passed -> failed (it hides)" in worse.stdout
    assert "breaks 1 promises that" in worse.stderr
    better = siirl("validate", "--compare", tmp_path / "b.json", tmp_path / "a" / "report.json")
    assert better.returncode == 0


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["--device", "cpo"], 2, "did you mean 'cpu'"),
        (["--device", "npu"], 3, "device 'npu' is not usable here"),
        (["--level", "deep"], 2, "'deep' is not one of 'smoke', 'full'"),
        (["--compare", "a.json", "b.json"], 2, "a.json is no file"),
    ],
)
def test_a_wrong_request_is_a_sentence(arguments: list[str], status: int, says: str) -> None:
    done = siirl("validate", *arguments)
    assert done.returncode == status
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_a_pattern_without_a_check_is_refused() -> None:
    with pytest.raises(RequestError, match=r"no check of a smoke run is called L9\.\*"):
        run("cpu", only=["L9.*"])


def test_the_checks_run_through_pytest(vendor: Path, tmp_path: Path) -> None:
    plugin = ["-p", "siirl.validation.pytest_plugin", "--pyargs", "siirl.validation", "-p", "no:cacheprovider"]
    options = [
        "--siirl-device",
        "forgetful",
        "-k",
        "L1.rng or L1.record_stream",
        "-q",
        "--rootdir",
        tmp_path,
        "-c",
        os.devnull,
    ]
    done = siirl(*plugin, *options, path=vendor, module="pytest")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 failed, 1 passed, 1 skipped" in done.stdout
    assert "test_promise[L1.rng_round_trip]" in done.stdout


def test_the_golden_record_is_what_the_cpu_computes() -> None:
    """Tokens and rewards to the last, numbers as near as two builds of a math library are."""
    with prepared(select("cpu"), "smoke") as subject:
        again = json.loads(golden.to_json(golden.record(subject.backend)))["steps"]
    kept: list[dict[str, Any]] = json.loads(golden.to_json(golden.read_golden()))["steps"]
    for now, then in zip(again, kept, strict=True):
        assert now["rollout"]["response_ids"] == then["rollout"]["response_ids"]
        assert now["rollout"]["rewards"] == then["rollout"]["rewards"]
        for a, b in zip(now["rollout"]["log_probs"], then["rollout"]["log_probs"], strict=True):
            assert a == pytest.approx(b, abs=1e-4)
        assert now["metrics"] == pytest.approx(then["metrics"], rel=1e-3, abs=1e-5)
    metrics = [step["metrics"] for step in kept]
    assert all(0.05 < step["actor/clip_fraction"] < 0.5 for step in metrics), "the clip is at work"
    assert all(abs(step["actor/loss"]) > 1e-2 for step in metrics), "a loss of nothing would compare to anything"
