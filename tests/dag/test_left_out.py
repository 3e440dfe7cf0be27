"""Nodes that nobody needs: a pure one whose columns no node reads is not in the plan, and the reason can be read."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from siirl.config.schema import Config
from siirl.dag import Graph, left_out, ops, plan_worker, register_op
from siirl.errors import RequestError
from tests.dag.test_planner import nodes, python

IDS = ["sample_id", "group_id", "slot", "prompt_ids", "row"]
MOST = 8


@pytest.fixture(scope="module", autouse=True)
def pure_op() -> Iterator[None]:
    """An op that reads up to ``MOST`` columns and writes one, and does nothing else."""
    register_op("pure_sum", reads=[f"r{i}?" for i in range(MOST)], writes=["out"], pure=True)(
        lambda batch, context: None
    )
    yield
    del ops._OPS["pure_sum"]


def reasons(graph: Graph, config: Config) -> dict[str, str]:
    return {row[0]: row[-1] for row in left_out(graph, config).rows}


def test_what_only_unread_nodes_read_goes_with_them(graph_of, config) -> None:
    graph = graph_of(
        "{id: first, op: pure_sum, writes: {out: a}}",
        "{id: second, op: pure_sum, reads: {r0: a}, writes: {out: b}}",
        "{id: used, op: pure_sum, reads: {r0: row}, writes: {out: c}}",
        python("end", reads="[c]", after="[second]"),
    )
    assert nodes(plan_worker(graph, config, 1, 0)) == ["data", "used", "end"]
    assert reasons(graph, config) == {
        "first": "no node that takes part reads 'a'",
        "second": "no node that takes part reads 'b'",
    }


def test_a_reader_that_its_condition_leaves_out_needs_nothing(graph_of, config) -> None:
    graph = graph_of(
        "{id: make, op: pure_sum, writes: {out: a}}",
        python("end", reads="[a?]", when="algorithm.kl_coef > 0"),
    )
    assert nodes(plan_worker(graph, config, 1, 0)) == ["data"]
    with_it = Config(algorithm={"kl_coef": 0.1})  # type: ignore[arg-type]
    assert nodes(plan_worker(graph, with_it, 1, 0)) == ["data", "make", "end"]


def test_what_has_an_effect_stays_without_a_reader(graph_of, config) -> None:
    graph = graph_of(python("own", writes="[a]"))
    assert nodes(plan_worker(graph, config, 1, 0)) == ["data", "own"]
    assert reasons(graph, config) == {}


def test_a_pass_and_a_model_that_no_loss_reads_are_left_out(config) -> None:
    graph = Graph.from_yaml("grpo")
    (old,) = [node for node in graph.nodes if node.id == "old"]
    graph.node(
        "watch", op="log_prob", model="reference", reads=["prompt_ids", "response_ids"], writes={"log_probs": "unread"}
    )
    worker = plan_worker(graph, config, 2, 0)
    assert old.id not in nodes(worker)
    assert worker.models == ("actor",)
    assert reasons(graph, config) == {
        "reference": "'algorithm.kl_coef > 0' is false",
        "old": "'algorithm.mini_batches * algorithm.epochs > 1 and rollout.max_staleness == 0' is false",
        "watch": "no node that takes part reads 'unread'",
    }


def test_an_op_that_writes_nothing_cannot_be_pure() -> None:
    with pytest.raises(RequestError, match="is pure, and writes nothing"):
        register_op("idle", pure=True)


@st.composite
def pipelines(draw: st.DrawFn) -> list[tuple[bool, list[int]]]:
    """For each node whether it is pure, and the earlier nodes whose column it reads."""
    count = draw(st.integers(1, MOST))
    return [(draw(st.booleans()), draw(st.lists(st.integers(0, i - 1), unique=True) if i else st.just([])))
            for i in range(count)]  # fmt: skip


@settings(max_examples=80, deadline=None)
@given(pipelines(), st.sampled_from([1, 3]), st.randoms())
def test_a_node_stays_exactly_if_something_with_an_effect_depends_on_it(pipeline, workers: int, random) -> None:
    needed: set[int] = set()
    for i in reversed(range(len(pipeline))):  # readers come after what they read
        pure, reads = pipeline[i]
        if not pure or i in needed:
            needed |= {i, *reads}
    graph = Graph("random").node("data", op="data", writes=IDS)
    for i in random.sample(range(len(pipeline)), len(pipeline)):
        pure, reads = pipeline[i]
        columns = {f"r{place}": f"c{j}" for place, j in enumerate(reads)}
        writes = {"out": f"c{i}"}
        graph.node(f"n{i}", op="pure_sum" if pure else "python:m:f", layout="groups", reads=columns, writes=writes)
    steps = plan_worker(graph, Config(), workers, 0).steps
    assert {step.id for step in steps if step.kind == "node"} == {"data", *(f"n{i}" for i in needed)}
    assert reasons(graph, Config()).keys() == {f"n{i}" for i in range(len(pipeline)) if i not in needed}
