"""All suites run, and count what the records say: a change that alters a counter comes with a new record."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from siirl.bench import SUITES
from siirl.bench.records import read
from tests.bench.commands import Commands

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


@pytest.mark.alone
def test_every_suite_runs_and_counts_what_is_recorded(bench: Commands) -> None:
    """Times of two rounds say nothing, and may grow a thousandfold."""
    done = bench("--pairs", "2", "--compare", str(RESULTS), "--tolerance", "1000")
    assert done.status == 0, f"{done.stderr}\nif it is meant: siirl bench --device cpu --json {RESULTS}"
    lines = done.stdout.splitlines()
    assert [line for line in lines if line in SUITES] == list(SUITES)
    assert max(map(len, lines)) <= 80
    for unit in ("GB/s", "calls/s", "tokens/s"):
        assert unit in done.stdout
    recorded = {read(path)["siirl"]["key"]["torch"].partition("+")[0] for path in RESULTS.glob("cpu_*.json")}
    if torch.__version__.partition("+")[0] in recorded:
        assert "counters equal" in done.stdout


def test_the_records_bear_their_keys_and_no_machine() -> None:
    records = [*RESULTS.glob("*_torch-*.json")]
    assert records
    for path in records:
        document = read(path)
        key = document["siirl"]["key"]
        assert path.name.startswith(f"{key['backend']}_")
        assert path.stem.endswith(key["commit"])
        assert {benchmark["group"] for benchmark in document["benchmarks"]} == {*SUITES}
        assert document["machine_info"].keys() == {"system", "machine", "python_version"}
