"""The simulator against measured runs of 1, 2, 4 and 8 workers on this machine.

    python benchmarks/validate_simulator.py [--json FILE] [--calibrate FILE.yaml]

A small recipe runs with each number of workers, the same batch, one thread a worker, interleaved over some rounds.
The cluster's facts come from runs with one worker, with the whole batch and with a quarter of it: the first gives
what work costs, their difference what a pass costs whatever its size. How much two busy cores slow each other down
comes from matrix products in one and in two processes, how fast messages are from collectives of two processes. Runs
with 2, 4 and 8 workers are then predicted, never looked at; what is compared is the ratio of a step's time to that of
one worker.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from siirl.config import load
from siirl.config.yaml import dump_yaml
from siirl.planning.cluster import Cluster, load_cluster
from siirl.planning.job import Job
from siirl.planning.loads import Loads
from siirl.planning.simulate import Disturbance, simulate
from siirl.planning.timing import phases
from siirl.planning.workload import Lengths

RECIPE = {
    "model": {"path": "tiny:qwen3:256:2:1024"},
    "data": {"source": "arithmetic:addition?digits=2", "prompts_per_step": 32, "max_prompt_tokens": 8},
    "pipeline": "grpo",
    "algorithm": {"mini_batches": 2},
    "rollout": {"group_size": 8, "max_new_tokens": 32, "ignore_eos": True},
    "training": {"micro_batch_tokens": 2048},
    "evaluation": {"at_end": False},
    "checkpoint": {"save_last": False},
    "logging": {"tensorboard": False, "trace": False, "report": False, "samples_every": 0},
    "threads_per_worker": 1,
}
PROMPT_TOKENS = 5.0
STAGES = {"rollout": "rollout", "reward": "reward", "old": "log_prob", "update": "update"}
WORKERS = (1, 2, 4, 8)
REDUCED = 8 * 2**20


def measure(recipe: Path, workers: int, prompts: int, steps: int) -> dict[str, float]:
    """Least seconds of a step and of its stages, the first step left out."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "siirl", "train", str(recipe), "--workers", str(workers), "--device", "cpu"]
        command += ["--run-dir", f"{folder}/run", f"training.steps={steps}", f"data.prompts_per_step={prompts}"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
    metrics = [json.loads(line) for line in lines][1:]
    keys = ("step", *STAGES.values())
    return {key: min(m.get(f"time/{key}_s", 0.0) for m in metrics) for key in keys}


def contention() -> float:
    """How much longer a matrix product takes while both of two processes compute."""
    alone, both = _products(1), _products(2)
    return max(1.0, both / alone)


def _products(processes: int) -> float:
    context = multiprocessing.get_context("spawn")
    with context.Pool(processes) as pool:
        return max(pool.map(_product_seconds, range(processes)))


def _product_seconds(_: int) -> float:
    import torch

    torch.set_num_threads(1)
    a, b = torch.randn(512, 256), torch.randn(256, 768)
    start, best = time.monotonic(), float("inf")
    while time.monotonic() - start < 4:
        begun = time.monotonic()
        for _ in range(40):
            a @ b
        best = min(best, time.monotonic() - begun)
    return best


def network() -> tuple[float, float]:
    """Bytes per second of an all-reduce between two processes, and seconds of a gathering of few integers."""
    with tempfile.TemporaryDirectory() as folder, multiprocessing.get_context("spawn").Pool(2) as pool:
        reduce_s, gather_s = map(
            min, zip(*pool.starmap(_collective_seconds, [(r, folder) for r in (0, 1)]), strict=True)
        )
    # two members send half of the bytes twice; integers are gathered in two rounds of one message
    return REDUCED / reduce_s, gather_s / 2


def _collective_seconds(rank: int, folder: str) -> tuple[float, float]:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    large, small = torch.zeros(REDUCED // 4), torch.zeros(2, dtype=torch.int64)

    def gather() -> None:
        for _ in range(2):
            dist.all_gather([torch.empty_like(small) for _ in range(2)], small)

    found = []
    for work in (lambda: dist.all_reduce(large), gather):
        seconds = []
        for _ in range(30):
            dist.barrier()
            begun = time.monotonic()
            work()
            seconds.append(time.monotonic() - begun)
        found.append(sorted(seconds)[len(seconds) // 2])
    dist.destroy_process_group()
    return found[0], found[1]


def predicted(job: Job) -> dict[str, float]:
    """Seconds of the stages of one worker."""
    loads = Loads.of(job.rows())
    found = {}
    for step in job.steps:
        if step.id in STAGES:
            parts = phases(job, step, loads)
            found[STAGES[step.id]] = sum(float(p.seconds.max()) + (p.together or 0) for p in parts)
    return found


def with_facts(cluster: Cluster, **changes: Any) -> Cluster:
    """A copy with other facts of device, host or sustained."""
    copy = cluster.model_copy(deep=True)
    for key, value in changes.items():
        section, name = key.split("__")
        setattr(getattr(copy, section), name, value)
    return copy


def calibrate(jobs: dict[int, Job], measured: dict[int, dict[str, float]], cluster: Cluster) -> Cluster:
    """Facts for which the model gives the measured seconds of rollout, update and reward of one worker.

    Args:
        jobs, measured: by prompts a step; two sizes.
    """
    small, large = sorted(jobs)

    def stage(prompts: int, name: str, facts: Cluster) -> float:
        from dataclasses import replace

        return predicted(replace(jobs[prompts], cluster=facts))[name]

    idle = with_facts(cluster, device__op_overhead_s=0.0, host__step_overhead_s=0.0, device__memory_bandwidth=1e15)
    # seconds = operators x overhead + products / (peak x part of it): two sizes, two unknowns
    only_ops = with_facts(idle, device__op_overhead_s=1.0, device__flops={"float32": 1e30})
    rows = [(stage(p, "rollout", only_ops), stage(p, "rollout", idle) * cluster.sustained.inference) for p in jobs]
    (a, b), (c, d) = rows if list(jobs) == [small, large] else rows[::-1]
    s, t = measured[small]["rollout"], measured[large]["rollout"]
    overhead = max(1e-7, (s * d - b * t) / (a * d - b * c))
    inference = (t - c * overhead) / d
    facts = with_facts(idle, device__op_overhead_s=overhead, sustained__inference=min(1.0, 1 / inference))
    operators = stage(large, "update", with_facts(facts, device__flops={"float32": 1e30}))
    products = (stage(large, "update", idle)) * cluster.sustained.training
    training = min(1.0, products / (measured[large]["update"] - operators))
    samples = (large - small) * jobs[large].group
    reward = max(1e-6, (measured[large]["reward"] - measured[small]["reward"]) / samples)
    rest = measured[large]["reward"] - reward * large * jobs[large].group
    return with_facts(facts, sustained__training=training, host__reward_s=reward, host__step_overhead_s=max(1e-4, rest))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, help="write measured and predicted seconds")
    parser.add_argument("--calibrate", type=Path, help="write the cluster file of this machine")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "recipe.yaml"
        recipe.write_text(dump_yaml(RECIPE))
        config = load(recipe).main
        full = config.data.prompts_per_step
        runs = [(1, full // 4), *((workers, full) for workers in WORKERS)]
        measured: dict[tuple[int, int], dict[str, float]] = {}
        for _ in range(arguments.rounds):
            for run in runs:
                new = measure(recipe, *run, arguments.steps)
                old = measured.get(run, new)
                measured[run] = new if new["step"] < old["step"] else old
                print(run, {k: round(v, 3) for k, v in new.items()}, flush=True)
    base = load_cluster("local-2").model_copy(update={"devices_per_node": os.cpu_count() or 1})
    base = with_facts(base, device__contention=contention())
    bandwidth, latency = network()
    base.links.intra_node.bandwidth = bandwidth / base.sustained.network
    base.links.intra_node.latency_s = latency
    lengths = Lengths.of(config, prompt=PROMPT_TOKENS)
    job = Job.of(config, base, 1, lengths)
    sizes = {p: _sized(job, p) for p in (full // 4, full)}
    cluster = calibrate(sizes, {p: measured[1, p] for p in sizes}, base)
    report(job, cluster, measured, arguments)


def _sized(job: Job, prompts: int) -> Job:
    data = job.config.data.model_copy(update={"prompts_per_step": prompts})
    return job.changed(job.config.model_copy(update={"data": data}))


def report(job: Job, cluster: Cluster, measured: dict[Any, dict[str, float]], arguments: argparse.Namespace) -> None:
    """Print and write the comparison."""
    from dataclasses import replace

    job = replace(job, cluster=cluster)
    full = job.config.data.prompts_per_step
    seconds = {w: simulate(job.changed(job.config, w), Disturbance(jitter=0.0), 0).plan.seconds for w in WORKERS}
    rows = []
    for w in WORKERS:
        m, p = measured[w, full]["step"], seconds[w]
        ratio_m, ratio_p = m / measured[1, full]["step"], p / seconds[1]
        rows.append({"workers": w, "measured_s": m, "predicted_s": p, "measured_ratio": ratio_m})
        rows[-1] |= {"predicted_ratio": ratio_p, "error": ratio_p / ratio_m - 1}
    print("workers  measured  predicted  ratio measured  ratio predicted  error")
    for r in rows:
        print(
            f"{r['workers']:7}  {r['measured_s']:7.3f}s  {r['predicted_s']:8.3f}s  {r['measured_ratio']:14.3f}  "
            f"{r['predicted_ratio']:15.3f}  {r['error']:+.1%}"
        )
    if arguments.calibrate:
        arguments.calibrate.write_text(dump_yaml(cluster.model_dump(mode="json")))
    if arguments.json:
        stages = {f"{w}x{p}": found for (w, p), found in measured.items()}
        content = {"recipe": RECIPE, "cluster": cluster.model_dump(mode="json"), "runs": rows, "measured": stages}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
