"""Sizes of a step: the table, and the combinations that are refused with a value that works."""

from __future__ import annotations

import re

import pytest

from siirl.config.schema import Config
from siirl.dag import Graph, batch_table, check_batch
from siirl.dag.plan import training_layout
from siirl.errors import RequestError

REFUSED = {
    "fewer prompts than workers": ({"data.prompts_per_step": 3}, 4, "data.prompts_per_step=4 or workers=3"),
    "prompts not divisible": (
        {"data.prompts_per_step": 10, "algorithm.mini_batches": 4},
        2,
        "data.prompts_per_step=12 or algorithm.mini_batches=2",
    ),
    "more mini-batches than prompts": (
        {"data.prompts_per_step": 6, "algorithm.mini_batches": 1_000_000_000},
        2,
        "data.prompts_per_step=1000000000 or algorithm.mini_batches=6",
    ),
    "mini-batch smaller than workers": (
        {"data.prompts_per_step": 8, "algorithm.mini_batches": 8, "rollout.group_size": 2},
        4,
        "algorithm.mini_batches=4",
    ),
    "sample longer than a micro-batch": (
        {"data.max_prompt_tokens": 100, "rollout.max_new_tokens": 29, "training.micro_batch_tokens": 128},
        1,
        "training.micro_batch_tokens=129",
    ),
    "tensor parallel of another size": ({"training.parallel.tensor": 3}, 4, "workers=3"),
    "pipeline parallel": ({"training.parallel.pipeline": 4}, 4, "training.parallel.pipeline=1"),
    "expert parallel": ({"training.parallel.expert": 6}, 4, "training.parallel.expert=2"),
    "data parallel of another size": ({"training.parallel.data": 2}, 4, "training.parallel.data=4"),
}


def make(values: dict[str, int]) -> Config:
    config = Config()
    for key, value in values.items():
        *sections, name = key.split(".")
        target: object = config
        for section in sections:
            target = getattr(target, section)
        setattr(target, name, value)
    return config


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_values_that_work(case: str) -> None:
    values, workers, fix = REFUSED[case]
    with pytest.raises(RequestError) as error:
        check_batch(make(values), workers)
    message = str(error.value)
    assert f"; set {fix}" in message
    for key, value in re.findall(r"([a-z_.]+)=(\d+)", fix):
        changed = {} if key == "workers" else {key: int(value)}
        check_batch(make(values | changed), int(value) if key == "workers" else workers)


@pytest.mark.parametrize("workers", [1, 2, 64])
def test_the_default_works(workers: int) -> None:
    check_batch(Config(), workers)


def test_tensor_and_context_parallel_leave_the_rest_to_data_parallel() -> None:
    config = make({"training.parallel.tensor": 2, "training.parallel.context": 2})
    check_batch(config, 8)
    assert str(training_layout(config, 8)) == "tokens (data 2, tensor 2, context 2)"
    assert training_layout(config, 8).shares() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    rows = {row[0]: row[2] for row in batch_table(config, 8).rows}
    assert rows["samples a mini-batch"] == "256"  # 64 prompts x 8 samples, two shares


def test_another_engine_may_have_other_layouts() -> None:
    config = make({"training.parallel.tensor": 2})
    config.training.engine = "megatron"
    check_batch(config, 4)
    with pytest.raises(RequestError, match="data 1 x tensor 2 .* is 2 workers, but the run has 3; set workers=2"):
        check_batch(config, 3)


def test_the_table_counts_prompts_samples_and_batches() -> None:
    values = {"data.prompts_per_step": 12, "rollout.group_size": 4, "algorithm.mini_batches": 3, "algorithm.epochs": 2}
    values |= {"data.max_prompt_tokens": 30, "rollout.max_new_tokens": 20, "training.micro_batch_tokens": 120}
    # 12 prompts x 4 = 48 samples; 16 a mini-batch, 8 a worker; two of 50 tokens fit into 120: 4 micro-batches.
    rows = {name: (total, each) for name, total, each, _ in batch_table(make(values), 2).rows}
    assert rows == {
        "prompts a step": ("12", "6"),
        "samples a step": ("48", "24"),
        "mini-batches a step": ("6", "6"),
        "samples a mini-batch": ("16", "8"),
        "micro-batches a mini-batch": ("up to 8", "up to 4"),
    }


def test_shares_that_do_not_divide() -> None:
    rows = {name: each for name, _, each, _ in batch_table(make({"data.prompts_per_step": 10}), 4).rows}
    assert rows["prompts a step"] == "2 to 3"
    assert rows["samples a step"] == "20"


def test_without_generation_a_prompt_is_a_sample() -> None:
    sft, config = Graph.from_yaml("sft"), make({"data.prompts_per_step": 8, "algorithm.mini_batches": 4})
    assert batch_table(config, 2, sft).rows[1][1] == "8"
    check_batch(config, 4)
    with pytest.raises(RequestError, match=r"a mini-batch has 2 samples \(8 prompts x 1 / 4 mini-batches\)"):
        check_batch(config, 4, sft)
