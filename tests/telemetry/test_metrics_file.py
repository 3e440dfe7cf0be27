"""`metrics.jsonl`: every finished step survives a kill, and a resumed run holds no step twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from siirl.errors import SiirlError
from siirl.telemetry.metrics import MetricsWriter, TensorBoardWriter, read_metrics

WARMUP = [{"stage": "warmup.0", "step": step, "actor/loss": 3.0 - step} for step in (1, 2, 3)]
MAIN = [{"stage": "main", "step": step, "reward/mean": step / 10} for step in (1, 2, 3, 4)]


def write(run_dir: Path, records: list[dict]) -> None:
    writer = MetricsWriter(run_dir)
    for record in records:
        writer.append(record)
    writer.close()


def test_every_line_is_on_disk_before_append_returns(tmp_path: Path) -> None:
    script = f"""
import os, signal
from siirl.telemetry.metrics import MetricsWriter
writer = MetricsWriter({str(tmp_path)!r})
for step in (1, 2, 3):
    writer.append({{"stage": "main", "step": step}})
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
    assert done.returncode == -signal.SIGKILL
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3]


def test_a_value_that_does_not_exist_is_absent_and_zero_is_zero(tmp_path: Path) -> None:
    record = {
        "stage": "main",
        "step": 1,
        "actor/kl": 0.0,
        "reward/failed": 0,
        "a": None,
        "b": float("nan"),
        "c": float("-inf"),
    }
    write(tmp_path, [record])
    assert read_metrics(tmp_path) == [{"stage": "main", "step": 1, "actor/kl": 0.0, "reward/failed": 0}]


@given(value=st.floats(allow_nan=False, allow_infinity=False))
def test_floats_come_back_bit_for_bit(tmp_path_factory: pytest.TempPathFactory, value: float) -> None:
    run_dir = tmp_path_factory.mktemp("run")
    write(run_dir, [{"stage": "main", "step": 1, "value": value}])
    assert read_metrics(run_dir)[0]["value"].hex() == value.hex()


def test_resuming_keeps_earlier_stages_and_drops_later_steps_and_stages(tmp_path: Path) -> None:
    write(tmp_path, WARMUP + MAIN)
    writer = MetricsWriter(tmp_path)
    writer.truncate_after("main", 2)
    assert read_metrics(tmp_path) == WARMUP + MAIN[:2]
    writer.truncate_after("warmup.0", 2)
    assert read_metrics(tmp_path) == WARMUP[:2]
    writer.append(MAIN[0])
    assert read_metrics(tmp_path) == [*WARMUP[:2], MAIN[0]]


def test_resuming_at_the_start_of_a_stage_without_lines_keeps_the_stages_before_it(tmp_path: Path) -> None:
    write(tmp_path, WARMUP)
    MetricsWriter(tmp_path).truncate_after("main", 0)
    assert read_metrics(tmp_path) == WARMUP


def test_resuming_leaves_the_kept_lines_byte_for_byte(tmp_path: Path) -> None:
    text = '{"stage": "main",  "step": 1, "x": 1e-7}\n'
    (tmp_path / "metrics.jsonl").write_text(text + '{"stage": "main", "step": 2}\n')
    MetricsWriter(tmp_path).truncate_after("main", 1)
    assert (tmp_path / "metrics.jsonl").read_text() == text


@pytest.mark.parametrize("length", range(1, len(json.dumps(MAIN[1]))))
def test_a_half_written_last_line_is_dropped_wherever_it_was_cut(tmp_path: Path, length: int) -> None:
    write(tmp_path, MAIN[:1])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(MAIN[1])[:length])
    assert read_metrics(tmp_path) == MAIN[:1]
    write(tmp_path, MAIN[2:3])
    assert read_metrics(tmp_path) == [MAIN[0], MAIN[2]]


def test_a_last_line_that_lacks_only_its_end_is_kept(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps(MAIN[0]))
    assert read_metrics(tmp_path) == MAIN[:1]
    write(tmp_path, MAIN[1:2])
    assert read_metrics(tmp_path) == MAIN[:2]


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"stage": "main", "step": 1}\n{"stage": \n{"stage": "main", "step": 3}\n')
    with pytest.raises(SiirlError, match=r"metrics\.jsonl, line 2, is not JSON"):
        read_metrics(tmp_path)


def test_a_run_without_the_file_has_no_metrics(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []


def test_importing_the_module_imports_neither_torch_nor_tensorboard() -> None:
    script = (
        "import sys, siirl.telemetry.metrics, siirl.telemetry.report, siirl.telemetry.display, siirl.telemetry.trace; "
    )
    script += "assert not {'torch', 'tensorboardX', 'numpy'} & set(sys.modules), 'heavy import'"
    subprocess.run(
        [sys.executable, "-c", script], check=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    )


def test_tensorboard_shows_numeric_values_by_stage_and_a_resumed_run_no_step_twice(tmp_path: Path) -> None:
    write(tmp_path, WARMUP + MAIN)
    first = TensorBoardWriter(tmp_path)
    first.append({"stage": "main", "step": 5, "reward/mean": 0.5, "note": "text", "flag": True, "gone": None})
    first.close()
    assert tensorboard_scalars(tmp_path)[-1] == ("main/reward/mean", 5, 0.5)
    MetricsWriter(tmp_path).truncate_after("main", 1)
    second = TensorBoardWriter(tmp_path)
    second.append({"stage": "main", "step": 2, "reward/mean": 0.75})
    second.close()
    expected = [("warmup.0/actor/loss", 1, 2.0), ("warmup.0/actor/loss", 2, 1.0), ("warmup.0/actor/loss", 3, 0.0)]
    expected += [("main/reward/mean", 1, pytest.approx(0.1)), ("main/reward/mean", 2, 0.75)]
    assert tensorboard_scalars(tmp_path) == expected


def tensorboard_scalars(run_dir: Path) -> list[tuple[str, int, float]]:
    """Read tag, step and value of every scalar; a TFRecord is a length, its checksum, data and their checksum."""
    from tensorboardX.proto.event_pb2 import Event

    scalars = []
    for path in sorted((run_dir / "tensorboard").glob("events.out.tfevents.*")):
        data = path.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + length])
            scalars += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
            data = data[16 + length :]
    return scalars
