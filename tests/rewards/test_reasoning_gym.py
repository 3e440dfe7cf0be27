"""Tasks of reasoning-gym: rows that went through JSON are scored as the task itself scores its own entries."""

from __future__ import annotations

import json

import pytest

from siirl.config.schema import DataConfig
from siirl.data.sources import open_source
from siirl.rewards import RewardPool, exact_json

reasoning_gym = pytest.importorskip("reasoning_gym", reason="the extra reasoning-gym is not installed")


@pytest.fixture(scope="module")
def pool():
    with RewardPool("reasoning_gym", timeout_s=60) as pool:
        yield pool


def through_json(source):
    return [json.loads(json.dumps(source[i])) for i in range(len(source))]


@pytest.mark.parametrize("task", ["chain_sum", "arc_1d", "rearc", "countdown", "n_queens"])
def test_the_tasks_own_answer_gets_its_full_score(pool, task):
    source = open_source(f"reasoning-gym:{task}?size=3", config=DataConfig(), seed=0)
    assert source.scorer == pool.spec
    rows = through_json(source)
    prompts = [row["prompt"] for row in rows]
    tagged = [f"<think>1</think> <answer> {row['answer']} </answer>" for row in rows]
    assert pool.score(prompts, [row["answer"] for row in rows], rows) == [(1.0, None)] * 3
    assert pool.score(prompts, tagged, rows) == [(1.0, None)] * 3


def test_scores_equal_those_of_the_entry_that_never_left_the_task(pool):
    """Graph colouring keeps tuples and integer keys in its metadata and has no answer of its own."""
    params = {"size": 4, "seed": 7, "min_num_vertices": 4, "max_num_vertices": 4}
    query = "&".join(f"{key}={value}" for key, value in params.items())
    rows = through_json(open_source(f"reasoning-gym:graph_color?{query}", config=DataConfig(), seed=0))
    dataset = reasoning_gym.create_dataset("graph_color", **params)
    good = [json.dumps(entry["metadata"]["possible_answer"]) for entry in dataset]
    for answers in (good, ["{}"] * 4, ["1"] * 4):
        expected = [dataset.score_answer(answer, dataset[i]) for i, answer in enumerate(answers)]
        assert [r.reward for r in pool.score([row["prompt"] for row in rows], answers, rows)] == expected
    assert [dataset.score_answer(answer, dataset[i]) for i, answer in enumerate(good)] == [1.0] * 4


def test_a_row_from_elsewhere_is_refused_with_the_source_it_needs(pool):
    [result] = pool.score(["p"], ["r"], [{"prompt": "p"}])
    assert result.reward is None
    assert "reasoning-gym:TASK" in result.error


@pytest.mark.parametrize(
    "value",
    [
        (1, (2, [3, ()])),
        {1: "a", (2, 3): {"b": None}},
        {"!tuple": [1]},
        {"!dict": 1, "a": (True, 1.5, "x")},
        [],
        {},
    ],
)
def test_exact_json_keeps_types(value):
    back = exact_json.decode(json.loads(json.dumps(exact_json.encode(value))))
    assert repr(back) == repr(value)
