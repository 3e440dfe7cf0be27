"""Random pipelines: whatever the planner emits is executed here, column by column, and must hold together."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import permutations

from hypothesis import given, settings
from hypothesis import strategies as st

from siirl.config.schema import Config
from siirl.dag import Graph, Step, due, plan_worker

CONFIG = Config()
IDS = ("sample_id", "group_id", "slot")
STEPS = range(1, 13)
# Condition -> the steps at which it holds.
CONDITIONS: dict[tuple[int | str, str | None], list[int]] = {
    (1, None): list(STEPS),
    (2, None): [2, 4, 6, 8, 10, 12],
    (1, "step > 4"): [5, 6, 7, 8, 9, 10, 11, 12],
    (3, "step > 4 and seed == 0"): [6, 9, 12],
    (1, "seed == 0"): list(STEPS),
    (1, "seed > 0"): [],
    ("evaluation.every", None): [],
}


@dataclass(frozen=True)
class Spec:
    """A random node as the test knows it."""

    name: str
    layout: str
    reads: tuple[tuple[str, bool], ...]
    writes: tuple[str, ...]
    after: tuple[str, ...]
    condition: tuple[int | str, str | None]

    @property
    def runs_at(self) -> list[int]:
        return CONDITIONS[self.condition]


@st.composite
def specs(draw: st.DrawFn, most: int = 9, conditions: bool = True) -> list[Spec]:
    """Nodes that read columns of earlier nodes only, the first of them the data; in any order of declaration."""
    data = Spec("data", "groups", (), (*IDS, "prompt_ids", "row"), (), (1, None))
    found = [data]
    for index in range(draw(st.integers(1, most))):
        condition = draw(st.sampled_from([(1, None), *CONDITIONS])) if conditions else (1, None)
        reads = []
        for writer in draw(st.lists(st.sampled_from(found), max_size=3, unique_by=lambda spec: spec.name)):
            always = set(writer.runs_at) == set(STEPS)
            reads += [(column, draw(st.booleans()) or not always) for column in writer.writes if draw(st.booleans())]
        found.append(
            Spec(
                f"n{index}",
                draw(st.sampled_from(["groups", "tokens"])),
                tuple(reads),
                tuple(f"c{index}_{i}" for i in range(draw(st.integers(0, 2)))),
                tuple(draw(st.sets(st.sampled_from([spec.name for spec in found]), max_size=2))),
                condition,
            )
        )
    return draw(st.permutations(found))


def graph_of(nodes: list[Spec]) -> Graph:
    graph = Graph("random")
    for spec in nodes:
        graph.node(
            spec.name,
            op="data" if spec.name == "data" else "python:m:f",
            layout=spec.layout,  # type: ignore[arg-type]
            reads=[column + "?" * optional for column, optional in spec.reads],
            writes=spec.writes,
            after=spec.after,
            every=spec.condition[0],
            when=spec.condition[1],
        )
    return graph


@settings(max_examples=80, deadline=None)
@given(specs(), st.sampled_from([1, 2, 5]))
def test_every_edge_is_respected(nodes: list[Spec], workers: int) -> None:
    steps = plan_worker(graph_of(nodes), CONFIG, workers, 0).steps
    order = [step.id for step in steps if step.kind == "node"]
    live = {spec.name: spec for spec in nodes if spec.runs_at}
    assert sorted(order) == sorted(live)
    writer = {column: spec.name for spec in live.values() for column in spec.writes}
    for name, spec in live.items():
        inputs = {writer[column] for column, _ in spec.reads if column in writer} | (set(spec.after) & set(live))
        assert all(order.index(other) < order.index(name) for other in inputs)


@settings(max_examples=80, deadline=None)
@given(specs(), st.sampled_from([1, 2, 5]))
def test_columns_are_there_when_read_and_no_longer(nodes: list[Spec], workers: int) -> None:
    steps = plan_worker(graph_of(nodes), CONFIG, workers, 0).steps
    known = {spec.name: spec for spec in nodes}
    layout, present = "groups", set()
    for index, step in enumerate(steps):
        match step.kind:
            case "node":
                spec = known[step.id]
                assert step.target is not None
                assert step.target.split == spec.layout
                if workers == 1 or not present:
                    layout = spec.layout  # nothing has to move
                assert layout == spec.layout
                assert set(step.reads.values()) <= present
                assert {column for column, optional in spec.reads if not optional} <= set(step.reads.values())
                assert not set(step.writes.values()) & present
                present |= set(step.writes.values())
                continue
            case "redistribute":
                assert step.source is not None
                assert step.target is not None
                assert (step.source.split, workers > 1) == (layout, True)
                assert step.target.split != layout
                assert set(step.fields) | set(IDS) <= present
                layout, present = step.target.split, set(step.fields)
            case "drop":
                assert set(step.fields) <= present
                present -= set(step.fields)
        assert present == {column for column in present if is_used(column, steps[index + 1 :])}
    assert not present


def is_used(column: str, ahead: tuple[Step, ...]) -> bool:
    """Whether a step still reads the column, or moves rows, which takes the ids, before the column ends."""
    for step in ahead:
        if column in step.reads.values() or (step.kind == "redistribute" and column in IDS):
            return True
        if step.kind == "redistribute" and column not in step.fields:
            return False
    return False


@settings(max_examples=60, deadline=None)
@given(specs())
def test_at_every_step_what_must_be_read_was_written(nodes: list[Spec]) -> None:
    steps = plan_worker(graph_of(nodes), CONFIG, 2, 0).steps
    known = {spec.name: spec for spec in nodes}
    for number in STEPS:
        present: set[str] = set()
        for step in steps:
            if step.kind != "node":
                assert due(step, number, CONFIG)
                present = present & set(step.fields) if step.kind == "redistribute" else present - set(step.fields)
            elif due(step, number, CONFIG):
                assert number in known[step.id].runs_at
                assert {column for column, optional in known[step.id].reads if not optional} <= present
                present |= set(step.writes.values())
            else:
                assert number not in known[step.id].runs_at


@settings(max_examples=60, deadline=None)
@given(specs(most=5, conditions=False))
def test_no_order_switches_layouts_less_often(nodes: list[Spec]) -> None:
    nodes = [replace(spec, after=(*spec.after, "data")) if spec.name != "data" else spec for spec in nodes]
    order = [step.id for step in plan_worker(graph_of(nodes), CONFIG, 1, 0).steps if step.kind == "node"]
    known = {spec.name: spec for spec in nodes}
    writer = {column: spec.name for spec in nodes for column in spec.writes}
    inputs = {spec.name: {writer[column] for column, _ in spec.reads} | set(spec.after) for spec in nodes}

    def switches(names: tuple[str, ...]) -> int:
        return sum(known[a].layout != known[b].layout for a, b in zip(names, names[1:], strict=False))

    valid = [
        names for names in permutations(known) if all(inputs[name] <= set(names[:i]) for i, name in enumerate(names))
    ]
    assert tuple(order) in valid
    assert switches(tuple(order)) == min(map(switches, valid))


@settings(max_examples=50, deadline=None)
@given(specs())
def test_yaml_keeps_the_graph_and_the_plan(nodes: list[Spec]) -> None:
    graph = graph_of(nodes)
    read = Graph.from_text(graph.to_yaml())
    assert read == graph
    assert plan_worker(read, CONFIG, 3, 1) == plan_worker(graph, CONFIG, 3, 1)
