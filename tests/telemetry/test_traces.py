"""Traces: complete events on one clock, one file a worker, merged into what trace viewers load."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from siirl.telemetry.jsonl import read_jsonl
from siirl.telemetry.report_time import Span, nest, step_spans, time_section
from siirl.telemetry.trace import Tracer, merge_traces, worker_file, worker_files


def test_a_span_is_written_with_its_place_on_the_wall_clock(tmp_path: Path) -> None:
    tracer = Tracer(tmp_path, rank=3)
    before = time.time()
    with tracer.span("rollout", step=7, stage="warmup.0", rows=16):
        time.sleep(0.02)
    after = time.time()
    assert not worker_file(tmp_path, 3).exists(), "nothing is written before flush"
    tracer.flush()
    (event,) = read_jsonl(tmp_path / "traces" / "worker_003.jsonl")
    assert (event["name"], event["ph"], event["pid"], event["tid"]) == ("rollout", "X", 3, 0)
    assert event["args"] == {"stage": "warmup.0", "step": 7, "rows": 16}
    assert 20_000 <= event["dur"] <= (after - before) * 1e6
    assert before - 0.01 <= event["ts"] / 1e6 <= after + 0.01


def test_a_span_whose_block_raises_is_still_timed(tmp_path: Path) -> None:
    tracer = Tracer(tmp_path, rank=0)
    with pytest.raises(RuntimeError), tracer.span("update", step=1):
        raise RuntimeError
    assert tracer.durations()["update"] > 0


def test_durations_add_up_since_the_last_call_even_when_nothing_is_written(tmp_path: Path) -> None:
    tracer = Tracer(tmp_path, rank=0, enabled=False)
    for _ in range(2):
        with tracer.span("reward", step=1):
            time.sleep(0.01)
    assert 0.02 <= tracer.durations()["reward"] < 1
    assert tracer.durations() == {}
    tracer.flush()
    assert worker_files(tmp_path) == []


def test_a_tracer_goes_on_after_what_a_killed_one_left_half_written(tmp_path: Path) -> None:
    path = worker_file(tmp_path, 0)
    path.parent.mkdir()
    path.write_text('{"name":"a","ts":1,"dur":1}\n{"name":"b","t')
    tracer = Tracer(tmp_path, rank=0)
    with tracer.span("c", step=1):
        pass
    tracer.flush()
    assert [event["name"] for event in read_jsonl(path)] == ["a", "c"]


def test_the_merged_trace_loads_as_one_document_that_begins_at_zero(tmp_path: Path) -> None:
    for rank in (0, 1, 10):
        tracer = Tracer(tmp_path, rank)
        with tracer.span("data", step=1), tracer.span("inner", step=1):
            pass
        tracer.flush()
    merged = json.loads(merge_traces(tmp_path).read_text())
    events = merged["traceEvents"]
    names = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert names == {0: "worker 0", 1: "worker 1", 10: "worker 10"}
    complete = [event for event in events if event["ph"] == "X"]
    assert len(complete) == 6
    assert min(event["ts"] for event in complete) == 0
    assert max(event["ts"] for event in complete) < 60e6
    assert abs(merged["otherData"]["start_unix_us"] / 1e6 - time.time()) < 60


def test_merging_without_traces_gives_an_empty_one(tmp_path: Path) -> None:
    assert json.loads(merge_traces(tmp_path).read_text())["traceEvents"] == []


def test_own_times_count_nothing_twice() -> None:
    spans = nest([Span("inner", 20, 30), Span("step", 0, 100), Span("deep", 25, 5), Span("next", 50, 10)])
    assert [(span.name, span.depth, span.own) for span in spans] == [
        ("step", 0, 60),
        ("inner", 1, 25),
        ("deep", 2, 5),
        ("next", 1, 10),
    ]
    assert sum(span.own for span in spans) == 100


def test_spans_one_after_another_are_not_taken_for_nested_by_rounding() -> None:
    start = 1_763_900_000_123_456.8
    durations = [1000.07 + 0.11 * number for number in range(200)]
    spans = []
    for duration in durations:
        spans.append(Span("node", start, duration))
        start += duration - 0.2
    assert {span.depth for span in nest(spans)} == {0}


def write_events(run_dir: Path, rank: int, events: list[tuple[str, int, str, float, float]]) -> None:
    path = worker_file(run_dir, rank)
    path.parent.mkdir(exist_ok=True)
    lines = []
    for stage, step, name, start, seconds in events:
        place = {"name": name, "ph": "X", "pid": rank, "tid": 0, "ts": start * 1e6, "dur": seconds * 1e6}
        lines.append(json.dumps(place | {"args": {"stage": stage, "step": step}}))
    path.write_text("\n".join(lines) + "\n")


def test_steps_that_a_resumed_run_did_again_are_shown_once(tmp_path: Path) -> None:
    killed = [
        ("warmup.0", 1, "update", 0, 1),
        ("main", 1, "update", 2, 1),
        ("main", 2, "update", 4, 9),
        ("main", 3, "update", 14, 9),
    ]
    resumed = [("main", 2, "update", 104, 2), ("main", 3, "update", 106, 3)]
    write_events(tmp_path, 0, killed + resumed)
    spans = step_spans(worker_file(tmp_path, 0))
    assert {key: [span.duration / 1e6 for span in step] for key, step in spans.items()} == {
        ("warmup.0", 1): [1],
        ("main", 1): [1],
        ("main", 2): [2],
        ("main", 3): [3],
    }


def test_a_step_s_seconds_are_the_mean_over_workers_of_every_node(tmp_path: Path) -> None:
    write_events(tmp_path, 0, [("main", 1, "rollout", 10, 4), ("main", 1, "update", 14, 2)])
    write_events(tmp_path, 1, [("main", 1, "rollout", 10.5, 2), ("main", 1, "update", 14, 4)])
    section = time_section(tmp_path, [])
    assert section["nodes"] == ["rollout", "update"]
    assert section["bars"] == [{"stage": "main", "step": 1, "last": 1, "seconds": [3.0, 3.0]}]
    rows = section["timeline"][0]["rows"]
    assert [row["spans"] for row in rows] == [[[0, 0, 4, 0], [1, 4, 2, 0]], [[0, 0.5, 2, 0], [1, 4, 4, 0]]]


def test_a_long_run_keeps_its_newest_timelines_and_says_how_many_are_left_out(tmp_path: Path) -> None:
    write_events(tmp_path, 0, [("main", step, "update", step * 2, 1) for step in range(1, 1001)])
    section = time_section(tmp_path, [])
    assert [entry["step"] for entry in section["timeline"]] == list(range(901, 1001))
    assert section["steps_left_out"] == 900
    assert len(section["bars"]) <= 240
    assert (section["bars"][0]["step"], section["bars"][-1]["last"]) == (1, 1000)
    assert all(bar["seconds"] == [1.0] for bar in section["bars"])


def test_without_traces_the_metrics_times_are_shown(tmp_path: Path) -> None:
    record = {"stage": "main", "step": 1, "time/step_s": 3.0, "time/rollout_s": 1.5, "time/update_s": 1.0}
    section = time_section(tmp_path, [record])
    assert section["nodes"] == ["rollout", "update", "other"]
    assert section["bars"][0]["seconds"] == [1.5, 1.0, 0.5]
    assert section["timeline"] == []
