"""`rollout.router_replay` adds a column to shipped pipelines, and refuses what cannot give it."""

from __future__ import annotations

import pytest

from siirl.config.schema import Config
from siirl.dag import Graph, plan_worker
from siirl.dag.plan import Step
from siirl.errors import RequestError

COLUMN = "router_choices"


def steps(pipeline: str, **rollout: object) -> list[Step]:
    config = Config.model_validate({"rollout": rollout, "algorithm": {"mini_batches": 2, "kl_coef": 0.1}})
    return list(plan_worker(Graph.from_yaml(pipeline), config, 2, 0).steps)


@pytest.mark.parametrize("pipeline", ["grpo", "ppo", "dapo"])
def test_the_actors_passes_read_what_rollout_wrote(pipeline: str) -> None:
    found = steps(pipeline, router_replay=True)
    assert [s.id for s in found if COLUMN in s.writes] == ["rollout"]
    readers = {s.id for s in found if COLUMN in s.reads}
    actor = {s.id for s in found if s.op == "log_prob" and s.model == "actor"}
    policy = {s.id for s in found if s.op == "update" and s.params.get("loss", "policy") == "policy"}
    assert readers == actor | policy
    assert len(readers) == 2
    assert any(COLUMN in s.fields for s in found if s.kind == "redistribute")
    assert not any(COLUMN in {*s.reads, *s.writes} for s in steps(pipeline))


def test_a_pipeline_without_rollout_is_left_as_it_is() -> None:
    assert steps("sft", router_replay=True) == steps("sft")


@pytest.mark.parametrize(
    ("others", "says"),
    [
        ({"engine": "vllm"}, "rollout.router_replay needs rollout.engine=native, for vllm does not say"),
        ({"partial": 0.5}, "rollout.partial carries begun ones without"),
    ],
)
def test_what_stands_against_it(others: dict[str, object], says: str) -> None:
    with pytest.raises(RequestError, match=says):
        steps("grpo", router_replay=True, **others)
