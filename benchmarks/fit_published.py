"""The simulator against published scaling curves: fitted on half of the points, checked on the other half.

    python benchmarks/fit_published.py [--json FILE] [--plot FILE.svg]

`data/published_scaling.json` has throughputs of a distributed data path (DistFlow) and of a single controller (verl
0.4.0) on 8 to 512 GPUs; batch and lengths were not published, so they are assumed here (`VALUES`). Three parameters are
fitted to a series: how much slower than the cost model devices work (`slower`, both data paths share it), how uneven
they are (`jitter`, shared too), and how fast the controller turns a batch into messages (`serialise`, bytes/s, from the
controller's points alone). Once every second point is fitted and those between are checked (interpolation), once the
smaller half is fitted and the larger half checked (extrapolation).
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from siirl.config.schema import Config
from siirl.planning.cluster import Cluster, load_cluster
from siirl.planning.job import Job
from siirl.planning.plot import Curve, Panel, svg
from siirl.planning.search import with_values
from siirl.planning.simulate import Disturbance, Point, scaled, simulate
from siirl.planning.workload import Lengths

DATA = Path(__file__).resolve().parent / "data" / "published_scaling.json"
VALUES = {
    "workers": 8,
    "data.prompts_per_step": 64,
    "data.max_prompt_tokens": 1024,
    "rollout.max_new_tokens": 2048,
    "training.dtype": "bfloat16",
    "training.sharding": "shard",
    "training.micro_batch_tokens": 16384,
}
LENGTHS = Lengths(512.0, 1024.0, 0.5, 2048)
MODELS = {"7B": "qwen2.5-7b", "32B": "qwen2.5-32b"}
GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class Parameters:
    """What is fitted to a series."""

    slower: float = 2.0
    jitter: float = 0.05
    serialise: float = 1e9


def base_job(series: dict[str, Any]) -> Job:
    """The assumed work of a series, per GPU the same on any number of them."""
    pipeline = "ppo" if series["algorithm"] == "PPO" else "grpo"
    values = VALUES | {"model.path": MODELS[series["model"]], "pipeline": pipeline}
    return Job.of(with_values(Config(), values), load_cluster("h100-8x8"), 8, LENGTHS)


def throughput(jobs: dict[int, Job], parameters: Parameters) -> dict[int, Point]:
    """A simulated step for each number of GPUs."""
    found = {}
    for gpus, job in jobs.items():
        cluster = _cluster(job.cluster, parameters)
        found[gpus] = simulate(replace(job, cluster=cluster), Disturbance(jitter=parameters.jitter), 0)
    return found


def _cluster(cluster: Cluster, parameters: Parameters) -> Cluster:
    copy = cluster.model_copy(deep=True)
    for name in ("training", "inference", "memory"):
        setattr(copy.sustained, name, min(1.0, getattr(cluster.sustained, name) / parameters.slower))
    copy.device.op_overhead_s *= parameters.slower
    copy.host.serialise_bandwidth = parameters.serialise
    return copy


def fit(series: dict[str, Any], jobs: dict[int, Job], chosen: Sequence[int]) -> Parameters:
    """The parameters that bring the simulation nearest to the chosen points, by least squares of logarithms."""
    part = {gpus: jobs[gpus] for gpus in chosen}
    measured = dict(zip(series["gpus"], series["distributed"], strict=True))
    found = Parameters()

    def residuals(parameters: Parameters) -> list[float]:
        points = throughput(part, parameters)
        return [math.log(points[g].plan.tokens_per_s / 1e3 / measured[g]) for g in chosen]

    def with_level(parameters: Parameters) -> Parameters:
        """The same unevenness at the speed that suits it best."""
        for _ in range(2):
            mean = sum(residuals(parameters)) / len(chosen)
            parameters = replace(parameters, slower=parameters.slower * math.exp(mean))
        return parameters

    def miss(jitter: float) -> float:
        level = with_level(replace(found, jitter=jitter))
        return sum(r * r for r in residuals(level))

    found = with_level(replace(found, jitter=_least(miss, 0.001, 0.4)))
    if "controller" not in series:
        return found
    controlled = dict(zip(series["gpus"], series["controller"], strict=True))

    def controller_miss(exponent: float) -> float:
        points = throughput(part, replace(found, serialise=10**exponent))
        return sum(math.log(points[g].controller.tokens_per_s / 1e3 / controlled[g]) ** 2 for g in chosen)

    return replace(found, serialise=10 ** _least(controller_miss, 6.0, 11.0))


def _least(miss: Callable[[float], float], low: float, high: float, steps: int = 14) -> float:
    """Golden-section search."""
    a, b = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
    miss_a, miss_b = miss(a), miss(b)
    for _ in range(steps):
        if miss_a < miss_b:
            high, b, miss_b = b, a, miss_a
            a = high - GOLDEN * (high - low)
            miss_a = miss(a)
        else:
            low, a, miss_a = a, b, miss_b
            b = low + GOLDEN * (high - low)
            miss_b = miss(b)
    return (low + high) / 2


def compare(series: dict[str, Any]) -> list[dict[str, Any]]:
    """Both halvings of a series: parameters, and the error of each point."""
    base, gpus = base_job(series), series["gpus"]
    jobs = {count: scaled(base, count, fixed_batch=False) for count in gpus}
    halves = {"interpolation": gpus[::2], "extrapolation": gpus[: -(-len(gpus) // 2)]}
    found = []
    for name, chosen in halves.items():
        parameters = fit(series, jobs, chosen)
        points = throughput(jobs, parameters)
        rows = []
        for index, count in enumerate(gpus):
            row: dict[str, Any] = {"gpus": count, "fitted": count in chosen}
            for side, run in (("distributed", points[count].plan), ("controller", points[count].controller)):
                if side in series:
                    simulated = run.tokens_per_s / 1e3
                    row[side] = {"published": series[side][index], "simulated": round(simulated, 2)}
                    row[side]["error"] = round(simulated / series[side][index] - 1, 4)
            rows.append(row)
        about = {"algorithm": series["algorithm"], "model": series["model"], "halves": name}
        found.append(about | {"parameters": vars(parameters), "points": rows})
    return found


def errors(results: list[dict[str, Any]], halves: str, fitted: bool, side: str) -> list[float]:
    """Absolute errors of all series."""
    return [
        abs(row[side]["error"])
        for result in results
        if result["halves"] == halves
        for row in result["points"]
        if row["fitted"] == fitted and side in row
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, help="write parameters and errors")
    parser.add_argument("--plot", type=Path, help="draw GRPO's curves of the 7B model")
    arguments = parser.parse_args()
    results = []
    for series in json.loads(DATA.read_text())["series"]:
        for result in compare(series):
            results.append(result)
            print(f"{result['algorithm']} {result['model']}, {result['halves']}: {result['parameters']}", flush=True)
            for row in result["points"]:
                shown = [f"{s} {row[s]['error']:+.1%}" for s in ("distributed", "controller") if s in row]
                print(f"  {row['gpus']:4} GPUs {'fitted ' if row['fitted'] else 'checked'} {', '.join(shown)}")
    summary = {}
    for halves in ("interpolation", "extrapolation"):
        for side in ("distributed", "controller"):
            checked = errors(results, halves, fitted=False, side=side)
            summary[f"{halves}, {side}"] = {"mean": sum(checked) / len(checked), "largest": max(checked)}
            mean, largest = (f"{summary[f'{halves}, {side}'][key]:.1%}" for key in ("mean", "largest"))
            print(f"{halves}, {side}: mean {mean}, largest {largest} of checked points")
    if arguments.json:
        arguments.json.write_text(json.dumps({"errors_of_checked_points": summary, "series": results}, indent=1) + "\n")
    if arguments.plot:
        arguments.plot.write_text(_picture(results))


def _picture(results: list[dict[str, Any]]) -> str:
    panels = []
    for algorithm in ("PPO", "GRPO"):
        wanted = (algorithm, "7B", "interpolation")
        rows = next(r for r in results if (r["algorithm"], r["model"], r["halves"]) == wanted)["points"]
        gpus = [row["gpus"] for row in rows]
        curves = [
            Curve(f"{side}, {what}", gpus, [row[side][what] for row in rows], dashed=what == "simulated")
            for side in ("distributed", "controller")
            for what in ("published", "simulated")
        ]
        panels.append(Panel(f"{algorithm}, 7B: thousand tokens/s", curves))
    return svg("Published and simulated throughput", panels)


if __name__ == "__main__":
    main()
