"""The progress display: one look tells where a run stands, on a terminal of 80 columns and in a log."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from siirl.telemetry import display
from siirl.telemetry.display import ProgressDisplay
from siirl.telemetry.metrics import MetricsWriter
from siirl.telemetry.progress import format_count, format_seconds, sparkline


def record(stage: str, step: int, **values: float) -> dict:
    return {"stage": stage, "step": step, "time/step_s": 2.0, "throughput/tokens_per_s": 12_345.6, **values}


def lines_of(run_dir: Path, total_steps: dict[str, int], records: list[dict], pause: float = 0.0) -> list[str]:
    stream = io.StringIO()
    writer = MetricsWriter(run_dir)
    with ProgressDisplay(run_dir, total_steps, stream):
        for entry in records:
            writer.append(entry)
            time.sleep(pause)
    return stream.getvalue().splitlines()


def test_a_log_gets_the_first_and_the_last_step_of_every_stage_and_few_between(tmp_path: Path) -> None:
    records = [record("warmup.0", step, **{"actor/loss": 0.125}) for step in range(1, 31)]
    records += [record("main", step, **{"reward/mean": step / 40, "actor/loss": -0.01}) for step in range(1, 41)]
    lines = lines_of(tmp_path, {"warmup.0": 30, "main": 40}, records)
    assert lines == [
        "warmup.0 1/30  loss 0.125  12.3k tokens/s  0:58 left",
        "warmup.0 30/30  loss 0.125  12.3k tokens/s  took 1:00",
        "main 1/40  reward 0.025  loss -0.01  12.3k tokens/s  1:18 left",
        "main 40/40  reward 1.000  loss -0.01  12.3k tokens/s  took 1:20",
    ]


def test_a_log_gets_a_line_once_the_interval_has_passed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(display, "_PLAIN_INTERVAL_S", 0.5)
    records = [record("main", step, **{"reward/mean": 0.5}) for step in range(1, 101)]
    lines = lines_of(tmp_path, {"main": 100}, records, pause=0.02)
    shown = [int(re.search(r"main (\d+)/", line)[1]) for line in lines]
    assert (shown[0], shown[-1]) == (1, 100)
    assert 3 <= len(shown) <= 8
    assert shown == sorted(set(shown))


def test_a_run_that_ends_early_shows_the_step_it_reached(tmp_path: Path) -> None:
    lines = lines_of(tmp_path, {"main": 40}, [record("main", step) for step in range(1, 8)])
    assert [line.split("  ")[0] for line in lines] == ["main 1/40", "main 7/40"]


def test_a_resumed_run_shows_the_steps_it_does_again_and_counts_those_before(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path)
    for step in range(1, 9):
        writer.append(record("main", step))
    stream = io.StringIO()
    with ProgressDisplay(tmp_path, {"main": 10}, stream):
        writer.truncate_after("main", 5)  # as the first worker of a resumed run does, some time after the start
        for step in range(6, 11):
            writer.append(record("main", step, **{"reward/mean": 0.5}))
    lines = stream.getvalue().splitlines()
    assert lines[0] == "main 6/10  reward 0.500  12.3k tokens/s  0:08 left"
    assert lines[-1].startswith("main 10/10  reward 0.500")


def test_a_half_written_line_is_waited_for(tmp_path: Path) -> None:
    stream = io.StringIO()
    with ProgressDisplay(tmp_path, {"main": 1}, stream), (tmp_path / "metrics.jsonl").open("w") as file:
        file.write('{"stage": "main", "st')
        file.flush()
        time.sleep(0.5)
        file.write('ep": 1}\n')
    assert stream.getvalue() == "main 1/1  took 0:00\n"


def test_a_reader_that_leaves_does_not_end_the_run(tmp_path: Path) -> None:
    reader, side = os.pipe()
    os.close(reader)
    writer = MetricsWriter(tmp_path)
    stream = os.fdopen(side, "w", closefd=False)
    with ProgressDisplay(tmp_path, {"main": 2}, stream):
        writer.append(record("main", 1))
        writer.append(record("main", 2))
    os.close(side)


SCRIPT = """
import sys, time
from siirl.telemetry.display import ProgressDisplay
from siirl.telemetry.metrics import MetricsWriter
run_dir = sys.argv[1]
writer = MetricsWriter(run_dir)
with ProgressDisplay(run_dir, {"warmup.0": 3, "main": 12000}, sys.stdout):
    for step in (1, 2, 3):
        writer.append({"stage": "warmup.0", "step": step, "actor/loss": 0.5, "time/step_s": 1.0})
    time.sleep(0.6)
    print("a line from elsewhere")
    for step in range(1, 31):
        writer.append({"stage": "main", "step": step, "reward/mean": step / 30, "actor/loss": -1.234567e-05,
                       "eval/reward_mean": 0.25, "throughput/tokens_per_s": 123456.0, "time/step_s": 30.0})
    time.sleep(0.6)
"""


def on_terminal(run_dir: Path, columns: int) -> str:
    """Run SCRIPT on a pseudo-terminal and return what it was sent."""
    terminal, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    variables = {
        name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR", "CI")
    }
    variables |= {"TERM": "xterm-256color", "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, "-c", SCRIPT, str(run_dir)]
    process = subprocess.Popen(command, stdin=side, stdout=side, stderr=side, env=variables)
    os.close(side)
    sent = b""
    while True:
        try:
            data = os.read(terminal, 1 << 16)
        except OSError:  # how Linux says that the other side is closed
            break
        if not data:
            break
        sent += data
    os.close(terminal)
    assert process.wait(30) == 0, sent.decode()
    return sent.decode()


def screen(sent: str) -> list[str]:
    """Return the lines a terminal shows at the end: of ANSI it knows what the display sends."""
    rows, row, column = [""], 0, 0
    for token in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|.|\n", sent, flags=re.DOTALL):
        if token == "\r":
            column = 0
        elif token == "\n":
            row += 1
            rows += [""] * (row + 1 - len(rows))
        elif token.startswith("\x1b"):
            assert token[-1] in "mAKhlGC", f"unknown to this test: {token!r}"
            if token[-1] == "A":
                row -= int(token[2:-1] or 1)
            elif token[-1] == "K":
                assert token == "\x1b[2K"
                rows[row] = ""
        else:
            rows[row] = rows[row][:column].ljust(column) + token + rows[row][column + 1 :]
            column += 1
    return [line.rstrip() for line in rows]


def test_eighty_columns_hold_the_whole_display(tmp_path: Path) -> None:
    sent = on_terminal(tmp_path, 80)
    lines = [line for line in screen(sent) if line]
    assert len(lines) == 4, lines
    elsewhere, warmup, main, values = lines
    assert elsewhere == "a line from elsewhere"
    assert re.fullmatch(r"warmup\.0  ━+ +3/3 +took 0:03", warmup)
    assert re.fullmatch(r"main      [━╺╸]+ +30/12000 +99:45:00 left", main)
    assert len(warmup) <= 80
    assert len(main) <= 80
    assert re.fullmatch(r" {10}reward 1\.000 ▁.*█  held-out 0\.250  loss -1\.23e-05  123k tokens/s", values)
    assert len(values) <= 80
    assert "…" not in sent


def test_a_narrow_terminal_is_not_overrun(tmp_path: Path) -> None:
    assert max(len(line) for line in screen(on_terminal(tmp_path, 50))) <= 50


def test_numbers_read_well() -> None:
    assert [format_seconds(value) for value in (0, 59.6, 61, 3600, 359_100)] == [
        "0:00",
        "1:00",
        "1:01",
        "1:00:00",
        "99:45:00",
    ]
    assert [format_count(value) for value in (3.14159, 999, 999.6, 12_345, 2.5e6, 7e9)] == [
        "3.14",
        "999",
        "1k",
        "12.3k",
        "2.5M",
        "7G",
    ]
    assert sparkline([0.0, 0.5, 1.0]) == "▁▅█"
    assert sparkline([0.5, 0.5]) == "▁▁"
