"""The data path of siirl against verl's controller and TransferQueue: one batch between the workers of two stages.

All sides move the same 4,096 samples (dataflow_batch.py: prompts of 1,024 tokens, log-normal responses of 1,024 at
most, the fields of a GRPO step) between as many worker processes, on one machine, in turns. siirl carries rows at their
length; verl and TransferQueue carry them padded to 2,048 tokens, with the masks and positions their workers read.
Afterwards each side proves by a digest that every token and value of every row arrived.

A hop. Before: worker i of N holds rows i x 4096 / N and so on, made by itself, in its private memory. After: each of
the N workers holds its rows for the next stage as tensors; what it held before is still there.

- siirl: one `redistribute`, rows dealt by tokens; rows that are balanced where they are stay. From the first worker's
  start, behind a barrier, to the last worker's end.
- siirl, all move: the same, but every row goes to another worker (siirl_side.py, `hop`, says how).
- verl: the workers return their rows to the controller, which puts them together; the controller splits them and
  passes them to the workers. From the controller's first call to the last answer. Nothing is balanced.
- TransferQueue: every worker puts its rows; then every worker gets those of its neighbour. From the first call to the
  last answer. Its storage is emptied between hops, outside the time. "ragged" puts rows without padding.

CPU is the processor time of all processes of a side from the first timed hop to the last, over the hops: what a machine
with other work to do adds to the time, it does not add here.
Memory is read from outside during a hop of its own, after the timed ones, of every process of a side: private memory
(RssAnon) every 2 ms, and its part of the shared memory (Pss_Shmem, a page over the processes that use it) every 50 ms.
See README.md for the environments.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dataflow_batch as common
from bars import Panel, draw
from machine import machine
from memory import Watch

from siirl.errors import RequestError, SiirlError

HERE = Path(__file__).resolve().parent
README = "benchmarks/README.md says how to make it"


@dataclass(frozen=True)
class Side:
    """One way to move the batch: its script, the module its Python must have, the role of the script's process."""

    name: str
    script: str
    module: str
    root_role: str
    work: dict[str, Any] = field(default_factory=dict)


SIDES = {
    "siirl": Side("siirl", "siirl_side.py", "siirl", "launcher", {"case": "real", "transport": "shared_memory"}),
    "siirl-full": Side(
        "siirl, all move", "siirl_side.py", "siirl", "launcher", {"case": "full", "transport": "shared_memory"}
    ),
    "verl": Side("verl", "verl_side.py", "verl", "controller"),
    "tq": Side("TransferQueue", "tq_side.py", "transfer_queue", "driver", {"case": "padded", "units": 2}),
    "tq-ragged": Side(
        "TransferQueue, ragged", "tq_side.py", "transfer_queue", "driver", {"case": "ragged", "units": 2}
    ),
}
RATIOS = [(ours, peer) for peer in ("verl", "tq", "tq-ragged") for ours in ("siirl", "siirl-full")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", nargs="+", type=int, default=[2, 4, 8], help="worker processes (default: 2 4 8)")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES), help="who takes part (default: all)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side and number of workers (default: 3)")
    parser.add_argument("--hops", type=int, default=5, help="timed hops of a run (default: 5)")
    parser.add_argument("--verl-python", type=Path, help="the Python of verl's environment")
    parser.add_argument("--tq-python", type=Path, help="the Python of TransferQueue's environment")
    parser.add_argument("--json", type=Path, help="where to write all numbers")
    parser.add_argument("--plot", type=Path, help="where to draw them (.svg)")
    arguments = parser.parse_args()
    pythons = {"siirl": sys.executable, "verl": arguments.verl_python, "transfer_queue": arguments.tq_python}
    try:
        check(arguments, pythons)
        results = {str(count): compare(count, arguments, pythons) for count in arguments.workers}
    except SiirlError as error:
        print(f"vs_dataflow: error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    print_table(results)
    if arguments.json:
        arguments.json.write_text(json.dumps({**machine(), "workers": results}, indent=1) + "\n")
    if arguments.plot:
        arguments.plot.write_text(plot(results))


def check(arguments: argparse.Namespace, pythons: dict[str, Path | str | None]) -> None:
    """Refuse what cannot work.

    Raises:
        RequestError: with what to do instead.
    """
    for name in ("rounds", "hops"):
        if getattr(arguments, name) < 1:
            raise RequestError(f"--{name} is {getattr(arguments, name)}; it must be at least 1")
    for count in arguments.workers:
        if count < 2 or common.SAMPLES % count:
            raise RequestError(f"--workers {count}: it must be at least 2 and divide {common.SAMPLES}")
    for module in dict.fromkeys(SIDES[name].module for name in arguments.sides):
        python = pythons[module]
        option = "--verl-python" if module == "verl" else "--tq-python"
        if python is None:
            raise RequestError(f"{option} is missing: {module} needs an environment of its own; {README}")
        if not Path(python).is_file():
            raise RequestError(f"{option}: there is no file {python}; {README}")
        if subprocess.run([python, "-c", f"import {module}"], capture_output=True).returncode:
            raise RequestError(f"{option}: {python} cannot import {module}; {README}")


def compare(workers: int, arguments: argparse.Namespace, pythons: dict[str, Path | str | None]) -> dict[str, Any]:
    """All rounds with one number of workers; the sides take turns."""
    digest = common.expected_digest()
    rounds: list[dict[str, Any]] = []
    versions: dict[str, str] = {}
    for number in range(arguments.rounds):
        done: dict[str, Any] = {"load_average": os.getloadavg()[0]}
        for name in arguments.sides:
            side = SIDES[name]
            result = run(side, pythons[side.module], side.work | {"workers": workers, "hops": arguments.hops})
            if (result["rows"], result["digest"]) != (common.SAMPLES, digest):
                raise SiirlError(f"{side.name} moved other samples: {result['rows']} rows, digest {result['digest']}")
            versions |= result.pop("versions")
            done[name] = result
        rounds.append(done)
        seconds = ", ".join(f"{name} {statistics.median(done[name]['seconds']):.3f} s" for name in arguments.sides)
        print(f"{workers} workers, round {number + 1} of {arguments.rounds}: {seconds}", file=sys.stderr)
    return {"versions": versions, "rounds": rounds}


def run(side: Side, python: Path | str | None, work: dict[str, Any]) -> dict[str, Any]:
    """One run of a side, in processes of its own; its memory is watched from here when it says so."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    memory: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as directory, open(Path(directory) / "errors.txt", "w+") as errors:
        file = Path(directory) / "work.json"
        file.write_text(json.dumps(work))
        process = subprocess.Popen(
            [str(python), str(HERE / side.script), str(file)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        assert process.stdin is not None and process.stdout is not None
        watch = Watch(process.pid, side.root_role)
        result, cpu = None, 0.0
        for line in process.stdout:
            if not line.startswith('{"event"'):
                continue  # a library's own words
            message = json.loads(line)
            match message.pop("event"):
                case "idle":
                    watch.idle()
                case "start":
                    cpu -= watch.cpu_seconds()
                case "stop":
                    cpu += watch.cpu_seconds()
                case "begin":
                    watch.begin()
                case "end":
                    memory = watch.end()
                case "result":
                    result = message
                    continue
            process.stdin.write("\n")
            process.stdin.flush()
        if process.wait() or result is None:
            errors.seek(0)
            last = errors.read().strip()[-2000:]
            raise SiirlError(f"the run of {side.name} ended with status {process.returncode}: {last}")
    share = (sum(result["held_bytes"]) + sum(result["arrived_bytes"])) / work["workers"]
    result |= {"cpu_s": cpu / work["hops"], "share_bytes": share}
    return result | {"memory": memory, "times_its_share": memory["largest"]["added"] / share}


def median(rounds: list[dict[str, Any]], side: str, value: Callable[[dict[str, Any]], float]) -> float:
    """The median over rounds of a number of one side."""
    return statistics.median(value(done[side]) for done in rounds)


def hop_seconds(run: dict[str, Any]) -> float:
    return statistics.median(run["seconds"])


def print_table(results: dict[str, dict[str, Any]]) -> None:
    """At most 80 columns."""
    print(f"one hop of {common.SAMPLES:,} samples: median over rounds\n")
    print(f"{'':<46}{'largest process, MB':^32}".rstrip())
    print(f"{'':<22}{'s':>8}{'CPU s':>8}{'MB':>7} {'private':>9}{'shared':>8}{'added':>8}{'share':>8}")
    for workers, result in results.items():
        print(f"{workers} workers")
        rounds = result["rounds"]
        for name in [name for name in SIDES if name in rounds[0]]:
            seconds, cpu, moved, private, shared, added, share = (
                median(rounds, name, get)
                for get in (
                    hop_seconds,
                    lambda run: run["cpu_s"],
                    lambda run: run["moved_bytes"] / 1e6,
                    lambda run: run["memory"]["largest"]["peak_private"] / 1e6,
                    lambda run: run["memory"]["largest"]["peak_shared"] / 1e6,
                    lambda run: run["memory"]["largest"]["added"] / 1e6,
                    lambda run: run["times_its_share"],
                )
            )
            print(
                f" {SIDES[name].name:<21}{seconds:>8.3f}{cpu:>8.3f}{moved:>7.1f} "
                f"{private:>9,.0f}{shared:>8,.0f}{added:>8,.0f}{share:>7.1f}×"
            )
    print_ratios(results)


def print_ratios(results: dict[str, dict[str, Any]]) -> None:
    """How many times longer the peers take: median (smallest–largest) of each round's own ratio."""
    rounds = next(iter(results.values()))["rounds"]
    wanted = [pair for pair in RATIOS if all(side in rounds[0] for side in pair)]
    if not wanted:
        return
    print(f"\n{'time of … over time of …':<26}" + "".join(f"{workers + ' workers':>18}" for workers in results))
    for ours, peer in wanted:
        cells = []
        for result in results.values():
            ratios = [hop_seconds(done[peer]) / hop_seconds(done[ours]) for done in result["rounds"]]
            cells.append(f"{statistics.median(ratios):.1f} ({min(ratios):.1f}–{max(ratios):.1f})")
        print(f"{f'{peer} / {ours}':<26}" + "".join(f"{cell:>18}" for cell in cells))


def plot(results: dict[str, dict[str, Any]]) -> str:
    """The picture of the table."""
    groups = [f"{workers} workers" for workers in results]
    names = [name for name in SIDES if name in next(iter(results.values()))["rounds"][0]]

    def series(value: Callable[[dict[str, Any]], float]) -> dict[str, list[float]]:
        return {
            SIDES[name].name: [median(result["rounds"], name, value) for result in results.values()] for name in names
        }

    title = f"One hop of {common.SAMPLES:,} samples between the workers of two stages"
    return draw(
        title,
        [
            Panel("Time of a hop", "seconds", groups, series(hop_seconds)),
            Panel(
                "Memory the largest process adds to its own when idle, private and shared",
                "MB",
                groups,
                series(lambda run: run["memory"]["largest"]["added"] / 1e6),
            ),
        ],
    )


if __name__ == "__main__":
    main()
