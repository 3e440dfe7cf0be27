"""What wins over what: pipeline defaults, `extends`, the recipe, overrides, warm-ups."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from siirl.config import Resolved, load
from siirl.errors import RequestError


@pytest.fixture
def write(tmp_path: Path):
    def write(name: str, text: str) -> Path:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return file

    return write


PIPELINE = "algorithm: {{kl_coef: {kl_coef}, clip_low: 0.11}}\nnodes: []\n"


def test_later_files_win_over_earlier_ones_and_the_recipe_over_both(write) -> None:
    write("a.yaml", "seed: 1\ntraining: {steps: 1, lr: 0.1, optimizer: sgd}\n")
    write("b.yaml", "training: {steps: 2, lr: 0.2}\n")
    config = load(write("c.yaml", "extends: [a.yaml, b.yaml]\ntraining: {lr: 0.3}\n")).main
    assert (config.seed, config.training.optimizer, config.training.steps, config.training.lr) == (1, "sgd", 2, 0.3)


def test_extends_is_relative_to_the_file_that_says_it(write) -> None:
    write("base/deep.yaml", "seed: 5\n")
    write("base/mid.yaml", "extends: deep.yaml\nname: mid\n")
    config = load(write("top.yaml", "extends: base/mid.yaml\n")).main
    assert (config.seed, config.name) == (5, "mid")


def test_a_list_replaces_and_a_mapping_merges(write) -> None:
    write("a.yaml", "rollout: {stop: [x, y]}\nreward: {params: {digits: 2, sign: true}}\n")
    config = load(write("b.yaml", "extends: a.yaml\nrollout: {stop: [z]}\nreward: {params: {digits: 3}}\n")).main
    assert config.rollout.stop == ["z"]
    assert config.reward.params == {"digits": 3, "sign": True}


def test_files_that_extend_each_other_are_refused(write) -> None:
    write("a.yaml", "extends: b.yaml\n")
    write("b.yaml", "\nextends: a.yaml\n")
    with pytest.raises(RequestError, match=r"b\.yaml:2: extends 'a\.yaml', which extends this file again"):
        load(write("top.yaml", "extends: a.yaml\n"))


def test_one_file_may_be_extended_twice_over_different_ways(write) -> None:
    write("root.yaml", "seed: 4\n")
    write("left.yaml", "extends: root.yaml\n")
    write("right.yaml", "extends: root.yaml\n")
    assert load(write("top.yaml", "extends: [left.yaml, right.yaml]\n")).main.seed == 4


def test_a_pipelines_constants_lie_under_the_recipe(write) -> None:
    write("p.yaml", PIPELINE.format(kl_coef=0.5))
    config = load(write("r.yaml", "pipeline: ./p.yaml\nalgorithm: {kl_coef: 0.25}\n")).main
    assert (config.algorithm.kl_coef, config.algorithm.clip_low) == (0.25, 0.11)


def test_a_pipeline_is_found_beside_the_file_that_names_it(write, tmp_path: Path, monkeypatch) -> None:
    write("base/p.yaml", PIPELINE.format(kl_coef=0.5))
    write("base/r.yaml", "pipeline: p.yaml\n")
    recipe = write("top.yaml", "extends: base/r.yaml\n")
    monkeypatch.chdir(tmp_path.parent)
    config = load(recipe).main
    assert config.algorithm.kl_coef == 0.5
    assert config.pipeline == str(tmp_path / "base/p.yaml")


def test_an_override_of_the_pipeline_brings_its_constants(write, tmp_path: Path) -> None:
    write("p.yaml", PIPELINE.format(kl_coef=0.5))
    write("q.yaml", PIPELINE.format(kl_coef=0.75))
    recipe = write("r.yaml", "pipeline: p.yaml\n")
    assert load(recipe, [f"pipeline={tmp_path}/q.yaml"]).main.algorithm.kl_coef == 0.75


# Warm-ups.

RECIPE = """
name: main job
seed: 7
training: {steps: 100, lr: 0.1}
warmup:
  - training: {steps: 10}
    rollout: {group_size: 2}
  - training: {lr: 0.01}
"""


def values(resolved: Resolved, *path: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for stage in resolved.stages:
        value: Any = stage.config
        for part in path:
            value = getattr(value, part)
        found[stage.name] = value
    return found


def test_warmups_run_first_each_as_an_overlay_on_the_main_stage(write) -> None:
    resolved = load(write("r.yaml", RECIPE))
    assert values(resolved, "training", "steps") == {"warmup.0": 10, "warmup.1": 100, "main": 100}
    assert values(resolved, "training", "lr") == {"warmup.0": 0.1, "warmup.1": 0.01, "main": 0.1}
    assert values(resolved, "seed") == {"warmup.0": 7, "warmup.1": 7, "main": 7}


def test_an_override_reaches_a_warmup_only_where_that_sets_no_value_of_its_own(write) -> None:
    resolved = load(write("r.yaml", RECIPE), ["training.steps=3", "training.lr=0.5", "rollout.top_k=4", "seed=9"])
    assert values(resolved, "training", "steps") == {"warmup.0": 10, "warmup.1": 3, "main": 3}
    assert values(resolved, "training", "lr") == {"warmup.0": 0.5, "warmup.1": 0.01, "main": 0.5}
    assert values(resolved, "rollout", "top_k") == {"warmup.0": 4, "warmup.1": 4, "main": 4}
    assert values(resolved, "seed") == {"warmup.0": 9, "warmup.1": 9, "main": 9}


def test_a_section_given_at_once_is_the_same_as_its_keys(write) -> None:
    at_once = load(write("r.yaml", RECIPE), ["training={steps: 3, lr: 0.5}"])
    assert at_once.stages == load(write("r.yaml", RECIPE), ["training.steps=3", "training.lr=0.5"]).stages


@pytest.mark.parametrize("override", ["warmup=[]", "warmup=null", {"warmup": []}, {"warmup": None}])
def test_warmups_can_be_left_out(write, override: Any) -> None:
    overrides = [override] if isinstance(override, str) else override
    assert [stage.name for stage in load(write("r.yaml", RECIPE), overrides).stages] == ["main"]


def test_a_warmup_can_be_addressed_by_its_number(write) -> None:
    resolved = load(write("r.yaml", RECIPE), ["warmup.0.training.steps=1", "warmup.1.rollout.top_k=3"])
    assert values(resolved, "training", "steps") == {"warmup.0": 1, "warmup.1": 100, "main": 100}
    assert values(resolved, "rollout", "top_k") == {"warmup.0": 0, "warmup.1": 3, "main": 0}
    with pytest.raises(RequestError, match=r"there is no warmup\.2; the config has 2 warm-ups"):
        load(write("r.yaml", RECIPE), ["warmup.2.training.steps=1"])


def test_warmups_come_with_extends_unless_the_recipe_has_its_own(write) -> None:
    write("base.yaml", RECIPE)
    inherited = load(write("a.yaml", "extends: base.yaml\n"))
    own = load(write("b.yaml", "extends: base.yaml\nwarmup: [{pipeline: sft}]\n"))
    none = load(write("c.yaml", "extends: base.yaml\nwarmup: []\n"))
    assert [len(resolved.stages) for resolved in (inherited, own, none)] == [3, 2, 1]


def test_a_warmup_with_its_own_pipeline_takes_that_pipelines_constants_and_none_of_the_mains(write) -> None:
    write("p.yaml", "algorithm: {kl_coef: 0.5, clip_low: 0.3}\nnodes: []\n")
    write("w.yaml", "algorithm: {kl_coef: 0.125, gamma: 0.5}\nnodes: []\n")
    recipe = write(
        "r.yaml",
        "pipeline: p.yaml\nalgorithm: {kl_coef: 0.25, lam: 0.9}\n"
        "warmup: [{pipeline: w.yaml, algorithm: {gamma: 0.75}}]\n",
    )
    resolved = load(recipe, ["algorithm.kl_coef=1.0"])
    # clip_low is the schema's, for p.yaml has no part in the warm-up; lam is the recipe's; gamma is the overlay's.
    assert values(resolved, "algorithm", "kl_coef") == {"warmup.0": 0.125, "main": 1.0}
    assert values(resolved, "algorithm", "clip_low") == {"warmup.0": 0.2, "main": 0.3}
    assert values(resolved, "algorithm", "lam") == {"warmup.0": 0.9, "main": 0.9}
    assert values(resolved, "algorithm", "gamma") == {"warmup.0": 0.75, "main": 1.0}


@pytest.mark.parametrize("key", ["workers: 4", "device: cpu", "run_dir: x", "seed: 1", "name: x", "model: {path: x}"])
def test_a_warmup_cannot_set_what_belongs_to_the_run(write, key: str) -> None:
    name = "model.path" if key.startswith("model") else key.partition(":")[0]
    with pytest.raises(RequestError, match=rf"r\.yaml:3: a warm-up cannot set '{name}'"):
        load(write("r.yaml", f"warmup:\n  - training: {{steps: 1}}\n    {key}\n"))


def test_a_warmup_trains_the_runs_adapters_or_all_weights(write) -> None:
    def recipe(main: int, warmup: int) -> str:
        lora = "model: {lora: {rank: %d}}"
        return f"{lora % main}\nwarmup:\n  - training: {{steps: 1}}\n    {lora % warmup}\n"

    for main, warmup in ((4, 0), (4, 4), (0, 0)):
        load(write("r.yaml", recipe(main, warmup)))
    with pytest.raises(RequestError) as caught:
        load(write("r.yaml", recipe(4, 8)))
    assert str(caught.value).endswith(
        "r.yaml:4: model.lora.rank is 8; in a warm-up it must be 4 as in the main stage, or 0"
    )
    with pytest.raises(RequestError, match="in a warm-up it must be 0 as in the main stage"):
        load(write("r.yaml", recipe(0, 8)))


@pytest.mark.parametrize("text", ["warmup: {steps: 1}", "warmup: [1]", "warmup: sft"])
def test_a_warmup_is_a_list_of_mappings(write, text: str) -> None:
    with pytest.raises(RequestError, match=r"r\.yaml:1: '?warmup"):
        load(write("r.yaml", text))
