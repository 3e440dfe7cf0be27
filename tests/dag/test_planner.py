"""Order, joins, conditions, redistribution and lifetimes of small pipelines."""

from __future__ import annotations

import time

import pytest

from siirl.config.schema import Config
from siirl.dag import Graph, Layout, Step, WorkerPlan, describe, due, plan, plan_worker
from siirl.errors import RequestError


def nodes(worker: WorkerPlan) -> list[str]:
    return [step.id for step in worker.steps if step.kind == "node"]


def moves(worker: WorkerPlan) -> list[Step]:
    return [step for step in worker.steps if step.kind == "redistribute"]


def dropped_after(worker: WorkerPlan) -> dict[str, str]:
    """Column -> the node after which it is dropped."""
    return {
        column: before.id
        for before, step in zip(worker.steps, worker.steps[1:], strict=False)
        if step.kind == "drop"
        for column in step.fields
    }


def python(name: str, layout: str = "groups", **keys: str) -> str:
    given = "".join(f", {key}: {value}" for key, value in keys.items())
    return f"{{id: {name}, op: 'python:m:{name}', layout: {layout}{given}}}"


def test_a_diamond_runs_both_branches_before_the_join(graph_of, config) -> None:
    graph = graph_of(
        python("join", reads="[l, r]"),
        python("right", reads="[top]", writes="[r]"),
        python("left", reads="[top]", writes="[l]"),
        python("top", reads="[prompt_ids]", writes="[top]"),
    )
    assert nodes(plan_worker(graph, config, 1, 0)) == ["data", "top", "right", "left", "join"]


def test_a_join_waits_for_its_deepest_source(graph_of, config) -> None:
    graph = graph_of(
        python("join", reads="[deep3, shallow]", writes="[j]"),
        python("after_join", reads="[j]"),
        python("shallow", writes="[shallow]"),
        python("deep1", reads="[row]", writes="[deep1]"),
        python("deep2", reads="[deep1]", writes="[deep2]"),
        python("deep3", reads="[deep2]", writes="[deep3]"),
    )
    order = nodes(plan_worker(graph, config, 1, 0))
    assert order == ["data", "shallow", "deep1", "deep2", "deep3", "join", "after_join"]


def test_after_orders_nodes_that_share_no_column(graph_of, config) -> None:
    graph = graph_of(python("a", after="[b]"), python("b", after="[c]"), python("c"))
    assert nodes(plan_worker(graph, config, 1, 0)) == ["data", "c", "b", "a"]


def test_a_node_that_only_writes_waits_for_the_rows(graph_of, config) -> None:
    graph = graph_of(python("constant", "tokens", writes="[x]"), python("end", reads="[x]"))
    graph.nodes.reverse()
    assert nodes(plan_worker(graph, config, 2, 0)) == ["data", "constant", "end"]


def test_order_holds_through_a_dropped_node(graph_of, config) -> None:
    graph = graph_of(
        python("a", after="[gone]"),
        python("gone", after="[gone_too]", when="false"),
        python("gone_too", after="[b]", reads="[x]", when="false"),
        python("b"),
        python("c", writes="[x]"),
    )
    assert nodes(plan_worker(graph, config, 1, 0)) == ["data", "b", "c", "a"]


def test_layouts_switch_as_rarely_as_the_edges_allow(graph_of, config) -> None:
    graph = graph_of(
        python("t1", "tokens", reads="[row]", writes="[t1]"),
        python("g1", reads="[row]", writes="[g1]"),
        python("t2", "tokens", reads="[row]", writes="[t2]"),
        python("g2", reads="[row]", writes="[g2]"),
        python("end", "tokens", reads="[t1, g1, t2, g2]"),
    )
    worker = plan_worker(graph, config, 2, 0)
    assert nodes(worker) == ["data", "g1", "g2", "t1", "t2", "end"]
    assert [step.id for step in moves(worker)] == ["redistribute:t1"]


def test_redistribution_takes_exactly_what_is_read_afterwards(graph_of, config) -> None:
    graph = graph_of(
        python("score", reads="[prompt_ids]", writes="[score, detail]"),
        python("norm", reads="[score, group_id]", writes="[normed]"),
        python("train", "tokens", reads="[prompt_ids, normed, slot]"),
    )
    groups, tokens = Layout("groups", 4, 4), Layout("tokens", 4, 4)
    for worker in plan(graph, config, 4):
        (move,) = moves(worker)
        assert move.fields == ("slot", "prompt_ids", "normed")
        assert (move.source, move.target) == (groups, tokens)
        assert (move.every, move.when) == (1, None)
        kinds = {step.id: step.target for step in worker.steps if step.kind == "node"}
        assert kinds == {"data": groups, "score": groups, "norm": groups, "train": tokens}
        assert dropped_after(worker) == {
            "row": "data",
            "detail": "score",
            "score": "norm",
            "slot": "train",
            "prompt_ids": "train",
            "normed": "train",
        }
    assert moves(plan_worker(graph, config, 1, 0)) == []
    assert dropped_after(plan_worker(graph, config, 1, 0)) == {
        "sample_id": "data",
        "row": "data",
        "detail": "score",
        "score": "norm",
        "group_id": "norm",
        "slot": "train",
        "prompt_ids": "train",
        "normed": "train",
    }


def test_the_ids_live_until_the_last_move(graph_of, config) -> None:
    graph = graph_of(
        python("a", "tokens", reads="[prompt_ids]", writes="[x]"),
        python("b", "groups", reads="[x]", writes="[y]"),
        python("c", "tokens", reads="[y]"),
    )
    worker = plan_worker(graph, config, 2, 1)
    ids = ("sample_id", "group_id", "slot")
    assert [step.fields for step in moves(worker)] == [(*ids, "prompt_ids"), (*ids, "x"), ("y",)]


def test_the_update_keeps_the_ids_it_does_not_list(graph_of, config) -> None:
    graph = graph_of(
        "{id: rollout, op: rollout, model: actor, reads: [prompt_ids], writes: [response_ids]}",
        "{id: update, op: update, model: actor, params: {loss: sft}, reads: [prompt_ids, response_ids]}",
    )
    (move,) = moves(plan_worker(graph, config, 2, 0))
    assert move.fields == ("sample_id", "slot", "prompt_ids", "response_ids")
    assert dropped_after(plan_worker(graph, config, 1, 0))["group_id"] == "rollout"


def test_what_a_repeating_node_does_not_wait_for_comes_after_it(graph_of, config) -> None:
    entries = [
        "{id: note, op: 'python:m:note', writes: []}",
        "{id: later, op: 'python:m:later', reads: [response_ids], writes: [x]}",
        "{id: keep, op: dynamic_sampling, params: {name: f}, reads: [group_id, y]}",
        "{id: scored, op: 'python:m:scored', reads: [response_ids], writes: [y], after: [rollout]}",
        "{id: rollout, op: rollout, model: actor, reads: [prompt_ids], writes: [response_ids]}",
    ]
    for order in (entries, entries[::-1]):
        steps = [step.id for step in plan_worker(graph_of(*order), config, 2, 0).steps if step.kind == "node"]
        assert steps[:4] == ["data", "rollout", "scored", "keep"]
        assert set(steps[4:]) == {"note", "later"}


def test_a_filter_has_its_place_between_what_it_keeps_and_what_it_drops(graph_of, config) -> None:
    entries = [
        "{id: rollout, op: rollout, model: actor, reads: [prompt_ids], writes: [response_ids]}",
        "{id: use, op: 'python:m:use', layout: tokens, reads: [response_ids, group_id], after: [keep]}",
        "{id: keep, op: filter, params: {name: varied}, reads: [response_ids, group_id]}",
    ]
    assert nodes(plan_worker(graph_of(*entries), config, 2, 0)) == ["data", "rollout", "keep", "use"]


def test_nodes_without_columns_move_nothing(graph_of, config) -> None:
    graph = graph_of(python("a", "tokens", after="[data]"), python("b", "groups", after="[a]"))
    assert moves(plan_worker(graph, config, 2, 0)) == []


def test_a_settled_condition_leaves_no_trace(graph_of) -> None:
    graph = graph_of(
        python("kl", writes="[kl]", when="algorithm.kl_coef > 0"),
        python("end", reads="{a: kl?, row: row}"),
    )
    without = plan_worker(graph, Config(), 1, 0)
    assert nodes(without) == ["data", "end"]
    assert without.steps[-2].reads == {"row": "row"}
    with_it = plan_worker(graph, Config(algorithm={"kl_coef": 0.1}), 1, 0)  # type: ignore[arg-type]
    assert nodes(with_it) == ["data", "kl", "end"]
    assert with_it.steps[-2].reads == {"a": "kl", "row": "row"}
    assert all(step.when is None for step in with_it.steps)


def test_two_nodes_may_write_a_column_when_only_one_takes_part(graph_of) -> None:
    graph = graph_of(
        python("one", writes="[x]", when="algorithm.kl_coef > 0"),
        python("two", writes="[x]", when="algorithm.kl_coef == 0"),
        python("end", reads="[x]"),
    )
    assert nodes(plan_worker(graph, Config(), 1, 0)) == ["data", "two", "end"]
    assert "one" in nodes(plan_worker(graph, Config(algorithm={"kl_coef": 1}), 1, 0))  # type: ignore[arg-type]


def test_every_and_when_are_kept_for_the_run(graph_of) -> None:
    config = Config(logging={"samples_every": 2})  # type: ignore[arg-type]
    graph = graph_of(
        python("often", every="logging.samples_every", writes="[x]"),
        python("late", every="4", reads="[x]", when="step > 5 and seed == 0"),
        python("always", reads="[x?]"),
    )
    worker = plan_worker(graph, config, 1, 0)
    steps = {step.id: step for step in worker.steps if step.kind == "node"}
    ran = {name: [n for n in range(1, 13) if due(step, n, config)] for name, step in steps.items()}
    assert ran == {
        "data": list(range(1, 13)),
        "often": [2, 4, 6, 8, 10, 12],
        "late": [8, 12],
        "always": list(range(1, 13)),
    }


def test_models_are_those_that_take_part() -> None:
    graph = Graph.from_yaml("grpo")
    assert plan_worker(graph, Config(), 1, 0).models == ("actor",)
    config = Config(algorithm={"kl_coef": 0.04})  # type: ignore[arg-type]
    assert plan_worker(graph, config, 1, 0).models == ("actor", "reference")


def test_every_worker_computes_the_same_plan_by_itself(config) -> None:
    plans = plan(Graph.from_yaml("ppo"), config, 3)
    assert [plan_worker(Graph.from_yaml("ppo"), config, 3, rank) for rank in range(3)] == plans
    assert [worker.rank for worker in plans] == [0, 1, 2]


def test_plans_survive_json(config) -> None:
    for name in ("grpo", "ppo", "sft"):
        for worker in plan(Graph.from_yaml(name), config, 2):
            assert WorkerPlan.from_json(worker.to_json()) == worker


def test_4096_workers_are_planned_and_described_in_two_seconds(config) -> None:
    start = time.perf_counter()
    plans = plan(Graph.from_yaml("ppo"), config, 4096)
    (table,) = describe(plans)
    assert time.perf_counter() - start < 2
    assert [worker.rank for worker in plans] == list(range(4096))
    assert "worker 0 of 4096, workers 1 to 4095 are alike" in table.title


def test_the_table_shows_layouts_moves_and_conditions(config) -> None:
    (table,) = describe(plan(Graph.from_yaml("grpo"), config, 2))
    rows = {row[1]: dict(zip(table.columns, row, strict=True)) for row in table.rows}
    assert rows["redistribute:update"]["layout"] == "groups → tokens"
    assert rows["redistribute:update"]["moves or frees"].startswith("sample_id, slot, prompt_ids")
    assert rows["samples"]["when"] == "every 10 steps"
    assert rows["update"]["model"] == "actor"
    assert [row[0] for row in table.rows] == [str(n) for n in range(1, len(table.rows) + 1)]


def test_plans_that_differ_get_a_table_each(config) -> None:
    plans = [*plan(Graph.from_yaml("grpo"), config, 2), *plan(Graph.from_yaml("sft"), config, 2)]
    assert [table.title.partition(";")[0] for table in describe(plans)] == [
        "grpo: worker 0 of 2, alike: 1",
        "sft: worker 0 of 2, alike: 1",
    ]


def test_a_rank_outside_the_run_is_our_mistake(config) -> None:
    with pytest.raises(AssertionError):
        plan_worker(Graph.from_yaml("grpo"), config, 2, 2)


def test_a_pipeline_that_does_not_train_has_no_use_for_a_disaggregated_placement(graph_of) -> None:
    config = Config(placement="disaggregated", workers=2)
    with pytest.raises(RequestError, match="set placement=colocated"):
        plan_worker(graph_of(python("a", reads="[row]")), config, 2, 0)


def test_a_disaggregated_placement_parts_the_plan_where_rows_are_trained_on(graph_of) -> None:
    config = Config(placement="disaggregated", workers=3)
    graph = graph_of(python("make", writes="[m]"), python("use", "tokens", reads="[m]"))
    training, generating = plan_worker(graph, config, 3, 0), plan_worker(graph, config, 3, 2)
    assert nodes(training) == ["use"]
    assert nodes(generating) == ["data", "make"]
    assert [step.target.shares() for step in moves(generating)] == [[[0], [1]]]


def carried(config: Config, workers: int, hosts: list[int] | None, rank: int = 0) -> dict[str, str | None]:
    """How the rows of each redistribution travel, by its id."""
    return {step.id: step.transport for step in plan_worker(Graph.from_yaml("grpo"), config, workers, rank, hosts).steps
            if step.kind == "redistribute"}  # fmt: skip


def test_rows_travel_through_shared_memory_among_workers_of_one_host() -> None:
    config = Config(workers=4)
    assert set(carried(config, 4, None).values()) == {"shared_memory"}
    assert set(carried(config, 4, [3, 3, 3, 3]).values()) == {"shared_memory"}
    for hosts in ([0, 0, 1, 1], [0, 1, 2, 3], [0, 0, 0, 1], [0, 1, 0, 1]):
        assert set(carried(config, 4, hosts).values()) == {"collectives"}
    assert set(carried(Config(workers=4, data={"transport": "collectives"}), 4, None).values()) == {"collectives"}  # type: ignore[arg-type]


def test_each_redistribution_has_the_way_that_its_own_workers_can_take(graph_of) -> None:
    """Workers 0, 1 train on one host, 2 generates on another: rows cross over once, and then stay on the first."""
    config = Config(placement="disaggregated", workers=3, rollout={"workers": 1})  # type: ignore[arg-type]
    graph = graph_of(
        python("make", writes="[m]"), python("look", "groups", reads="[m]"), python("use", "tokens", reads="[m]"),
        python("again", "groups", reads="[m]", after="[use]"),
    )  # fmt: skip
    steps = plan_worker(graph, config, 3, 0, [0, 0, 1]).steps
    assert [step.transport for step in steps if step.kind == "redistribute"] == ["collectives", "shared_memory"]


def test_shared_memory_that_does_not_reach_is_refused() -> None:
    config = Config(workers=4, data={"transport": "shared_memory"})  # type: ignore[arg-type]
    assert set(carried(config, 4, None).values()) == {"shared_memory"}
    with pytest.raises(RequestError, match=r"of 2 hosts \(redistribute:.*\); set it to auto"):
        carried(config, 4, [0, 0, 1, 1])
