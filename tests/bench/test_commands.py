"""`siirl bench` as it is called: it is silent when nothing changed, and ends with 4 when something became worse."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bench.commands import Commands, as_it_is, slower, with_a_copy

pytestmark = pytest.mark.alone

SMALL = ("kernels", "dispatch", "--only=call", "--only=fwd swiglu", "--only=fwd rope torch f32")
OP = ("kernels", "--only", "fwd swiglu")


@pytest.fixture(scope="module")
def record(bench: Commands, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a second provider of swiglu that does what the reference does."""
    bench.register("swiglu", "twin", as_it_is)
    path = tmp_path_factory.mktemp("records") / "before.json"
    done = bench(*SMALL, "--json", str(path))
    assert done.status == 0, done.stderr
    return path


@pytest.fixture
def restored(bench: Commands):
    yield
    bench.register("swiglu", "torch", as_it_is)
    bench.register("swiglu", "twin", as_it_is)


@pytest.mark.slow
def test_ten_runs_of_the_same_code_raise_no_alarm(bench: Commands, record: Path) -> None:
    runs = [bench(*SMALL, "--compare", str(record)) for _ in range(10)]
    assert [done.status for done in runs] == [0] * 10, [done.stderr for done in runs if done.status]
    assert all("counters equal, times within 10%" in " ".join(done.stdout.split()) for done in runs)


@pytest.mark.parametrize("provider", ["twin", "torch"])
def test_an_op_that_became_slower_by_30_percent_is_caught(
    bench: Commands, record: Path, restored: None, provider: str
) -> None:
    bench.register("swiglu", provider, slower)
    done = bench(*OP, "--compare", str(record))
    assert done.status == 4
    assert f"REGRESSION kernels: fwd swiglu {provider} " in done.stdout
    assert "measured again with 3 times the pairs" in done.stdout
    assert "→" not in done.stderr, "by its time, for its counters are what they were"
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("siirl: error: ")
    assert "of the reference's time" in done.stderr


def test_a_changed_counter_is_named_with_its_values(bench: Commands, record: Path, restored: None) -> None:
    bench.register("swiglu", "twin", with_a_copy)
    done = bench(*OP, "--only", "twin f32", "--compare", str(record), "--tolerance", "100")
    assert done.status == 4
    # silu, mul; their two results
    assert "op_calls 2 → 3, allocations 2 → 3" in done.stderr
    assert "(aten.clone.default 0 → 1)" in done.stderr


@pytest.mark.parametrize(
    ("part", "value", "said"),
    [
        ("torch", "1.0.0", "nothing is compared: torch release is 2."),
        ("backend", "other", "nothing is compared: backend is cpu here and other there"),
        ("device", "another CPU", "only counters are compared, no times: device is "),
        ("driver", "driver 1", "only counters are compared, no times: driver is none here and driver 1 there"),
    ],
)
def test_a_record_with_another_key_is_said_to_be_one_and_raises_no_alarm(
    bench: Commands, record: Path, restored: None, tmp_path: Path, part: str, value: str, said: str
) -> None:
    document = json.loads(record.read_text())
    document["siirl"]["key"][part] = value
    for benchmark in document["benchmarks"]:
        benchmark["extra_info"]["ratio_high"] = 1e-3  # whatever is measured is slower
    other = tmp_path / "other.json"
    other.write_text(json.dumps(document))
    done = bench(*OP, "--pairs", "3", "--compare", str(other))
    assert done.status == 0, done.stderr
    assert said in " ".join(done.stdout.split())


def test_a_directory_gives_the_record_of_the_same_key(bench: Commands, tmp_path: Path) -> None:
    first = bench("dispatch", "--pairs", "3", "--compare", str(tmp_path), "--json", str(tmp_path))
    assert "nothing is compared" in first.stdout
    (written,) = tmp_path.iterdir()
    assert written.name.startswith("cpu_")
    again = bench("dispatch", "--pairs", "3", "--compare", str(tmp_path), "--tolerance", "100")
    assert again.status == 0
    assert written.name in again.stdout.replace("\n  ", "")


def test_a_benchmark_that_is_gone_is_a_regression_and_a_new_one_is_none(
    bench: Commands, record: Path, tmp_path: Path
) -> None:
    document = json.loads(record.read_text())
    gone = next(b for b in document["benchmarks"] if b["name"] == "fwd swiglu twin f32 512x3072")
    gone |= {"name": "fwd swiglu old f32", "fullname": "kernels: fwd swiglu old f32"}
    other = tmp_path / "other.json"
    other.write_text(json.dumps(document))
    done = bench(*OP, "--pairs", "3", "--compare", str(other), "--tolerance", "100")
    assert done.status == 4
    assert "kernels: fwd swiglu old f32 is no longer measured" in done.stderr
    assert "new, compared with nothing: kernels: fwd swiglu twin f32 512x3072" in done.stdout.replace("\n  ", " ")


def test_what_is_shown_fits_80_columns_and_has_units(bench: Commands, record: Path) -> None:
    done = bench("kernels", "dispatch", "--only=swiglu", "--pairs", "1", "--compare", str(record))
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "GB/s" in done.stdout
    assert "calls/s" in done.stdout


def test_the_json_is_pytest_benchmarks(record: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest_benchmark", "compare", "--columns=min,ops", str(record)],
        cwd=record.parent, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "swiglu" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["kernel"], "unknown suite 'kernel'; did you mean 'kernels'"),
        (["xyz"], "unknown suite 'xyz'; there are kernels, dispatch, "),
        (["--compare", "nowhere.json"], "--compare: there is no file nowhere.json"),
        (["--tolerance", "0"], "'--tolerance': 0.0 is not in the range"),
        (["--pairs", "0"], "'--pairs': 0 is not in the range"),
        (["dispatch", "--only", "no such name"], "none of the benchmarks was wanted"),
    ],
)
def test_a_wrong_request_is_refused(bench: Commands, arguments: list[str], said: str) -> None:
    done = bench(*arguments)
    assert done.status == 2
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("text", ["no json", "[]", '{"benchmarks": []}'])
def test_a_file_of_something_else_is_refused(bench: Commands, tmp_path: Path, text: str) -> None:
    other = tmp_path / "other.json"
    other.write_text(text)
    done = bench("dispatch", "--compare", str(other))
    assert done.status == 2
    assert f"{other} " in done.stderr


def test_without_pytest_benchmark_one_sentence_says_what_to_install(tmp_path: Path) -> None:
    """In a process that cannot find it; nothing is measured first."""
    program = "import sys; sys.modules['pytest_benchmark'] = None; from siirl.cli.main import main; main(['bench'])"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == "siirl: error: siirl bench needs pytest-benchmark: pip install 'siirl[bench]'\n"
