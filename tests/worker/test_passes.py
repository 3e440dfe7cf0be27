"""How many passes through the model a real run makes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from siirl.dag import Graph
from tests.worker import runs

COUNT = """
def watch(batch, context):
    for engine in context.models.engines.values():
        if not hasattr(engine, "passes"):
            engine.passes = passes = {"forward": 0, "backward": 0}
            def count(kind, passes=passes):
                passes[kind] += 1
            engine.module.register_forward_hook(lambda *_, count=count: count("forward"))
            weight = next(engine.module.parameters())
            if weight.requires_grad:
                weight.register_hook(lambda _, count=count: count("backward"))
def report(batch, context):
    for name, engine in context.models.engines.items():
        for kind, number in engine.passes.items():
            context.metrics.sum(f"custom/{name}_{kind}", number)
            engine.passes[kind] = 0
"""


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ([], {"actor_forward": 1, "actor_backward": 1}),
        (["algorithm.mini_batches=2"], {"actor_forward": 4, "actor_backward": 2}),
        pytest.param(
            ["algorithm.kl_coef=0.1"],
            {"actor_forward": 1, "actor_backward": 1, "reference_forward": 1},
            marks=pytest.mark.long,
        ),
    ],
    ids=["on policy", "two updates", "reference"],
)
def test_grpo_passes_once_where_once_is_enough(keys: list[str], expected: dict[str, int], tmp_path: Path) -> None:
    recipe = runs.write_recipe(tmp_path)
    (tmp_path / "count.py").write_text(COUNT)
    graph = Graph.from_yaml("grpo")
    graph.node("watch", op=f"python:{tmp_path}/count.py:watch", after=["rollout"])
    graph.node("report", op=f"python:{tmp_path}/count.py:report", layout="tokens", after=["sync"])
    counted = ("update", "old", "reference")
    graph.nodes = [replace(n, after=(*n.after, "watch")) if n.id in counted else n for n in graph.nodes]
    (tmp_path / "counted.yaml").write_text(graph.to_yaml())
    runs.run(recipe, tmp_path / "run", "pipeline=counted.yaml", "training.micro_batch_tokens=1000", *keys)
    lines = runs.metrics(tmp_path / "run")
    assert len(lines) == 3
    for line in lines:
        passes = {name.removeprefix("custom/"): n for name, n in line.items() if name.startswith("custom/") and n}
        assert passes == expected
