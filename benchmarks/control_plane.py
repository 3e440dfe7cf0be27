"""What it costs workers to agree: steps in which the models do nothing, for 1, 2, 4 ... 64 worker processes.

A step reads 128 prompts, gives each a response of one token, deals the samples to the workers by tokens as before an
update, reduces the metrics and writes them: all that `siirl train` does besides computing. Nodes are those of
control_plane_ops.py, on the smallest model. Each number of workers is one run of the command line.

- step: wall time from one step to the next, median over the steps but the first two.
- in collectives: mean over the workers, and the least of them, of the time in calls of `Collectives`. With more
  workers than cores it is mostly the wait for the others to have their turn on a core.
- CPU: processor time of all workers in a step. What it costs, whoever waits.
- start: from the command to the end of the first step, imports, meeting and model included.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from machine import machine

from siirl.device.host import memory_available as available

HERE = Path(__file__).resolve().parent
STEPS, SKIPPED = 20, 2
RECIPE = """
device: cpu
threads_per_worker: 1
timeout_s: 1800
pipeline: {pipeline}
model: {{path: "tiny:qwen3:16:1:99"}}
data: {{source: "arithmetic:addition?digits=1", prompts_per_step: 128, max_prompt_tokens: 4}}
rollout: {{group_size: 1, max_new_tokens: 4}}
training: {{steps: {steps}}}
checkpoint: {{save_last: false}}
logging: {{tensorboard: false, report: false, trace: false}}
"""
PIPELINE = """
name: control_plane
nodes:
  - {{id: clock, op: "python:{ops}:clock", reads: [], writes: []}}
  - {{id: data, op: data, writes: [sample_id, group_id, slot, prompt_ids, row]}}
  - {{id: respond, op: "python:{ops}:respond", reads: [prompt_ids], writes: [response_ids]}}
  - {{id: learn, op: "python:{ops}:learn", layout: tokens, reads: [prompt_ids, response_ids], writes: []}}
"""


def measure(workers: int, folder: Path) -> dict[str, Any]:
    """One run of `workers` workers; times in seconds."""
    (folder / "control_plane.yaml").write_text(PIPELINE.format(ops=HERE / "control_plane_ops.py"))
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE.format(pipeline=folder / "control_plane.yaml", steps=STEPS))
    run_dir = folder / f"run{workers}"
    command = [sys.executable, "-m", "siirl", "train", str(recipe)]
    command += ["--workers", str(workers), "--run-dir", str(run_dir)]
    began, metrics = time.perf_counter(), run_dir / "metrics.jsonl"
    free = least = available()
    first = 0.0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            least = min(least, available())
            if not first and metrics.is_file() and metrics.stat().st_size:
                first = time.perf_counter() - began
            time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"the run of {workers} workers ended with status {process.returncode}")
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    steps = [{key: value for key, value in line.items() if key.startswith("control/")} for line in lines]
    assert len(steps) == STEPS
    assert all(step["control/samples"] == 128 for step in steps)

    def median(name: str) -> float:
        return statistics.median(step[f"control/{name}"] for step in steps[SKIPPED:])

    return {
        "workers": workers,
        "step_s": median("wall_s"),
        "collectives_s": median("collectives_s"),
        "collectives_least_s": median("collectives_least_s"),
        "cpu_s": median("cpu_s"),
        "calls": median("calls"),
        "redistribute_s": statistics.median(line.get("time/redistribute_s", 0.0) for line in lines[SKIPPED:]),
        "start_s": first,
        "whole_s": time.perf_counter() - began,
        "memory_bytes": free - least,
        "steps": steps,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    arguments = parser.parse_args()
    heading = ("workers", "step ms", "in collectives ms", "least ms", "CPU ms", "calls", "start s", "memory GiB")
    print("  ".join(heading), flush=True)
    results = []
    for workers in arguments.workers:
        with tempfile.TemporaryDirectory(prefix="siirl-control-plane-") as folder:
            result = measure(workers, Path(folder))
        results.append(result)
        times = [result[key] * 1e3 for key in ("step_s", "collectives_s", "collectives_least_s", "cpu_s")]
        cells = [str(workers), *(f"{ms:.1f}" for ms in times), f"{result['calls']:.0f}", f"{result['start_s']:.1f}"]
        cells.append(f"{result['memory_bytes'] / 2**30:.1f}")
        print("  ".join(cell.rjust(len(head)) for cell, head in zip(cells, heading, strict=True)), flush=True)
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"machine": machine(), "steps": STEPS, "results": results}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
