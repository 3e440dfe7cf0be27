"""Runs of the pipeline `dapo` with probes, and an account of what became of every sample."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from siirl.dag import Graph, Read
from tests.worker import runs

# Right or wrong by the first character, and a little for the length. Of four tries of a tiny random model most groups
# have right and wrong ones, some do not; the rewards of nearly all differ.
REWARD = """
def first(prompt, response, sample):
    return float(response[:1] in tuple("02468abcdefghijk")) + 0.01 * len(response)
"""

PROBES = """
import json
import torch
def write(context, name, facts):
    folder = context.run_dir / "probes"
    folder.mkdir(exist_ok=True)
    place = f"{name}_{context.step:03d}_{context.pool.rounds:02d}_{context.collectives.rank}.json"
    (folder / place).write_text(json.dumps({"step": context.step, **facts}))
def grade(batch, context):
    return {"accuracy": (batch.dense("reward") >= 1).float()}
def generated(batch, context):
    names = ("sample_id", "group_id", "accuracy")
    write(context, "generated", {name: batch.dense(name).tolist() for name in names})
def trained(batch, context):
    facts = {name: batch.dense(name).tolist() for name in ("sample_id", "group_id", "slot", "policy_version")}
    old, drawn = batch.ragged("old_log_probs"), batch.ragged("rollout_log_probs")
    facts["gap"] = [float((a - b).abs().max()) for a, b in zip(old.rows(), drawn.rows())]
    engine, minis = context.models.actor, context.config.algorithm.mini_batches
    facts["micro_batches"] = [len(engine._micro_batches(batch, rows)) for rows in engine._mini_batches(batch, minis)]
    write(context, "trained", facts)
def lose(batch, context):
    context.pool.rows = context.pool.rows.take([])
"""

# at a rate of 0.05 a random number lies within 1e-8 of the edge between two tokens, so that rounding decides
SGD = ("training.optimizer=sgd", "training.max_grad_norm=null", "training.lr=0.06")
USUAL = ("training.steps=7", "algorithm.oversample=2", "algorithm.mini_batches=2", *SGD)


def write_recipe(folder: Path, *, leftovers_lost: bool = False) -> Path:
    """The small recipe with the pipeline `dapo`, whose groups and training rows are written to ``probes/``.

    The groups that are kept are those in which the accuracy differs, not the reward.
    """
    recipe = runs.write_recipe(folder)
    (folder / "rewards.py").write_text(REWARD)
    (folder / "probes.py").write_text(PROBES)
    recipe.write_text(recipe.read_text().replace(":digits", ":first") + "pipeline: probed.yaml\n")
    graph = Graph.from_yaml("dapo")
    graph.node("grade", op=f"python:{folder}/probes.py:grade", reads=["reward"], writes=["accuracy"], after=["rollout"])
    graph.node("see", op=f"python:{folder}/probes.py:generated", reads=["accuracy", "group_id"])
    ids = ["prompt_ids", "response_ids", "group_id", "slot"]
    graph.node(
        "look",
        op=f"python:{folder}/probes.py:trained",
        layout="tokens",
        reads=[*ids, "policy_version", "old_log_probs", "rollout_log_probs"],
    )
    waits = {"keep": ("see",), "update": ("look",)}
    graph.nodes = [replace(node, after=node.after + waits.get(node.id, ())) for node in graph.nodes]
    keep = next(index for index, node in enumerate(graph.nodes) if node.id == "keep")
    measured = {**graph.nodes[keep].reads, "reward": Read("accuracy")}
    graph.nodes[keep] = replace(graph.nodes[keep], reads=measured)
    if leftovers_lost:
        graph.node("lose", op=f"python:{folder}/probes.py:lose", after=["sync"])
    (folder / "probed.yaml").write_text(graph.to_yaml())
    return recipe


def probes(run_dir: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(file.read_text()) for file in sorted((run_dir / "probes").glob(f"{name}_*.json"))]


def leftovers(checkpoint: Path) -> list[int]:
    """The sample ids that wait in a checkpoint."""
    files = sorted(checkpoint.glob("worker_*.safetensors"))
    return [sample for file in files for sample in load_file(file)["sample_id"].tolist()]


def last_checkpoint(run_dir: Path) -> Path:
    return max((run_dir / "checkpoints").glob("step_*"))


def account(run_dir: Path) -> tuple[list[int], list[int]]:
    """The samples that were lost, and those that were seen more than once; a sound run has none of either.

    Every sample that was generated is trained on once, or filtered, or waits in the last checkpoint. Whether it has to
    be filtered follows from the accuracy of its group's samples when they were generated.
    """
    accuracy: dict[int, set[float]] = defaultdict(set)
    made: list[tuple[int, int]] = []
    for probe in probes(run_dir, "generated"):
        for sample, group, right in zip(probe["sample_id"], probe["group_id"], probe["accuracy"], strict=True):
            accuracy[group].add(right)
            made.append((sample, group))
    filtered = [sample for sample, group in made if len(accuracy[group]) == 1]
    trained = [sample for probe in probes(run_dir, "trained") for sample in probe["sample_id"]]
    waiting = leftovers(last_checkpoint(run_dir))
    seen = Counter(trained) + Counter(filtered) + Counter(waiting)
    once = Counter({sample: 1 for sample, _ in made})
    repeated = seen - once + (Counter(sample for sample, _ in made) - once)
    return sorted((once - seen).elements()), sorted(repeated.elements())


def total(run_dir: Path, key: str) -> float:
    return sum(line[f"sampling/{key}_groups"] for line in runs.metrics(run_dir))


def by_step(found: Iterable[dict[str, Any]], name: str) -> dict[int, list[Any]]:
    """A probe's column over all workers and rounds, step by step."""
    columns: dict[int, list[Any]] = defaultdict(list)
    for probe in found:
        columns[probe["step"]] += probe[name]
    return columns
