"""Values are typed by the schema; what does not fit is refused in one sentence with its place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from siirl.config import Config, describe, load
from siirl.config.keys import unknown
from siirl.errors import RequestError


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    file = tmp_path / "r.yaml"
    file.write_text("name: r\n")
    return file


def refusal(file: Path, overrides: Any = ()) -> str:
    with pytest.raises(RequestError) as caught:
        load(file, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("training.lr=1e-3", "training.lr", 0.001),
        ("training.lr=1", "training.lr", 1.0),
        ("training.micro_batch_tokens=16_384", "training.micro_batch_tokens", 16384),
        ("training.max_grad_norm=null", "training.max_grad_norm", None),
        ("training.betas=[0.9, 0.95]", "training.betas", (0.9, 0.95)),
        ("training.deterministic=false", "training.deterministic", False),
        ("rollout.stop=[a, '1']", "rollout.stop", ["a", "1"]),
        ("reward.params.tolerance=0.5", "reward.params", {"tolerance": 0.5}),
        ("reward.params={a: {b: 1}}", "reward.params", {"a": {"b": 1}}),
        # What the schema calls text stays as it was typed.
        ("name=123", "name", "123"),
        ("name=1e-3", "name", "1e-3"),
        ("name=true", "name", "true"),
        ("name=a: b # c", "name", "a: b # c"),
        ("name=", "name", ""),
        ("name='null'", "name", "null"),
        ("model.path=tiny:qwen3:64:2:128", "model.path", "tiny:qwen3:64:2:128"),
        ("data.prompt_template={prompt}=", "data.prompt_template", "{prompt}="),
        ("data.prompt_template={prompt", "data.prompt_template", "{prompt"),
        ("data.system_prompt=null", "data.system_prompt", None),
        ("data.system_prompt='null'", "data.system_prompt", "null"),
    ],
)
def test_an_override_has_the_schemas_type(recipe: Path, override: str, path: str, value: Any) -> None:
    found: Any = load(recipe, [override]).main
    for part in path.split("."):
        found = getattr(found, part)
    assert found == value
    assert type(found) is type(value)


def test_of_two_overrides_of_one_key_the_last_wins(recipe: Path) -> None:
    assert load(recipe, ["seed=1", "seed=2"]).main.seed == 2
    assert load(recipe, ["rollout.top_k=1", "rollout={top_k: 2}"]).main.rollout.top_k == 2


def test_python_overrides_are_values_not_texts(recipe: Path) -> None:
    overrides = {"training.steps": 5, "training": {"lr": 0.5}, "model.path": Path("/m"), "training.betas": (0.5, 0.5)}
    config = load(recipe, overrides).main
    assert (config.training.steps, config.training.lr, config.model.path) == (5, 0.5, "/m")
    assert config.training.betas == (0.5, 0.5)
    assert refusal(recipe, {"training.steps": "5"}) == (
        "overrides: training.steps is '5'; it must be a whole number greater than 0"
    )


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("training.steps=many", "training.steps is 'many'; it must be a whole number greater than 0"),
        ("training.steps=0", "training.steps is 0; it must be a whole number greater than 0"),
        ("training.steps=2.5", "training.steps is 2.5; it must be a whole number greater than 0"),
        ("training.steps=true", "training.steps is true; it must be a whole number greater than 0"),
        ("training.steps='5'", "training.steps is '5'; it must be a whole number greater than 0"),
        ("training.steps=", "training.steps is null; it must be a whole number greater than 0"),
        ("rollout.top_p=1.5", "rollout.top_p is 1.5; it must be a number greater than 0 and at most 1"),
        ("data.label_noise=2", "data.label_noise is 2; it must be a number from 0 to 1"),
        ("training.lr=.nan", "training.lr is NaN; it must be a number of at least 0"),
        ("training.lr=.inf", "training.lr is Infinity; it must be a number of at least 0"),
        ("training.deterministic=yes", "training.deterministic is 'yes'; it must be true or false"),
        ("training.deterministic=1", "training.deterministic is 1; it must be true or false"),
        ("rollout.engine=natve", "rollout.engine is 'natve'; it must be 'native' or 'vllm'; did you mean 'native'?"),
        ("rollout.stop=a", "rollout.stop is 'a'; it must be a list, each entry text"),
        ("rollout.stop=[1]", "rollout.stop[0] is 1; rollout.stop must be a list, each entry text"),
        ("training.max_grad_norm=x", "training.max_grad_norm is 'x'; it must be a number greater than 0, or null"),
        ("training=5", "'training' is a section; set one of its keys, such as training.engine"),
        ("rollout.group_sise=2", "unknown key 'rollout.group_sise'; did you mean 'rollout.group_size'?"),
        ("rollout.stop.x=2", "unknown key 'rollout.stop.x'; did you mean 'rollout.stop'?"),
        ("extends=x.yaml", "'extends' can only stand at the top of a file"),
        ("training.steps", "'training.steps' is not of the form KEY=VALUE, such as training.steps=5"),
        ("=5", "'=5' is not of the form KEY=VALUE, such as training.steps=5"),
        ("warmup.x=1", "'warmup.x' must be 'warmup' or 'warmup.NUMBER.KEY', such as warmup.0.training.steps"),
    ],
)
def test_a_wrong_override_is_refused_in_one_sentence(recipe: Path, override: str, sentence: str) -> None:
    assert refusal(recipe, [override]) == f"command line: {sentence}"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "seed: 1\nrollout:\n  group_sise: 8\n",
            ":3: unknown key 'rollout.group_sise'; did you mean 'rollout.group_size'?",
        ),
        ("group_size: 8\n", ":1: unknown key 'group_size'; did you mean 'rollout.group_size'?"),
        (
            "\ntraining: {temperature: 1}\n",
            ":2: unknown key 'training.temperature'; did you mean 'rollout.temperature'?",
        ),
        ("xyzzy: 8\n", ":1: unknown key 'xyzzy'"),
        ("seed: 1\nname: 2024\n", ":2: name is 2024; it must be text"),
        ("rollout: 5\n", ":1: 'rollout' is a section; its keys are engine, group_size"),
        (
            "training:\n  betas:\n  - 0.9\n  - 1.5\n",
            ":4: training.betas[1] is 1.5; training.betas must be a list of 2 values",
        ),
        ("training:\n  betas: [0.9]\n", ":2: training.betas is a list; it must be a list of 2 values"),
        (
            "training:\n  steps: 0\n  lr: -1\n",
            ":2: training.steps is 0; it must be a whole number greater than 0 (and 1 more)",
        ),
        ("warmup:\n- training:\n    steps: x\n", ":3: training.steps is 'x'"),
        ("warmup:\n- training:\n    stepz: 1\n", ":3: unknown key 'training.stepz'; did you mean 'training.steps'?"),
        ("\nextends: nowhere.yaml\n", ":2: extends names 'nowhere.yaml', which does not exist"),
        ("extends: [1]\n", ":1: 'extends' must be a file or a list of files"),
        ("\n\npipeline: grop\n", ":3: no such pipeline: 'grop'; did you mean 'grpo'?"),
        ("seed: 1\nseed: 2\n", ":2: key 'seed' is given twice"),
        ("rollout: [\n", ":2: is not valid YAML"),
    ],
)
def test_a_wrong_recipe_is_refused_with_file_and_line(recipe: Path, text: str, sentence: str) -> None:
    recipe.write_text(text)
    assert refusal(recipe).startswith(f"{recipe}{sentence}")


def test_a_value_from_an_extended_file_is_reported_there(recipe: Path) -> None:
    base = recipe.with_name("base.yaml")
    base.write_text("seed: 1\ntraining: {steps: -1}\n")
    recipe.write_text("extends: base.yaml\nname: r\n")
    assert refusal(recipe).startswith(f"{base}:2: training.steps is -1")


def test_a_constant_from_a_pipeline_is_reported_there(recipe: Path) -> None:
    pipeline = recipe.with_name("p.yaml")
    pipeline.write_text("name: p\nalgorithm:\n  kl_coef: -1\n")
    recipe.write_text("pipeline: p.yaml\n")
    assert refusal(recipe).startswith(f"{pipeline}:3: algorithm.kl_coef is -1")


def test_a_missing_recipe_is_refused_with_the_nearest_one(recipe: Path) -> None:
    wrong = recipe.with_name("rr.yaml")
    assert refusal(wrong) == f"no such config file: '{wrong}'; did you mean '{recipe}'?"
    assert refusal(recipe.parent) == f"'{recipe.parent}' is a directory, not a config file"


@pytest.mark.parametrize(
    ("text", "path", "value"),
    [
        ("training: {lr: 1e-3}", "training.lr", 0.001),
        ("training: {micro_batch_tokens: 010}", "training.micro_batch_tokens", 10),
        ("name: on", "name", "on"),
        ("name: 12:30", "name", "12:30"),
        ("name: 2026-01-01", "name", "2026-01-01"),
        ("rollout: {stop: [no, yes]}", "rollout.stop", ["no", "yes"]),
        ("rollout:\n  # top_k: 5\n", "rollout.top_k", 0),
        ("", "seed", 0),
    ],
)
def test_yaml_holds_no_surprise(recipe: Path, text: str, path: str, value: Any) -> None:
    recipe.write_text(text)
    found: Any = load(recipe).main
    for part in path.split("."):
        found = getattr(found, part)
    assert found == value


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("lr", "training.lr"),
        ("temprature", "rollout.temperature"),
        ("algorithm.kl_coeff", "algorithm.kl_coef"),
        ("training.group_size", "rollout.group_size"),
        ("algoritm", "algorithm"),
        ("extend", "extends"),
        ("warmups", "warmup"),
    ],
)
def test_the_nearest_key_is_sought_in_the_whole_schema(key: str, meant: str) -> None:
    assert unknown(key) == f"unknown key '{key}'; did you mean '{meant}'?"


def test_the_description_covers_every_key_with_its_default() -> None:
    described = {key.key: key for key in describe()}
    flat = dict(_flatten(Config()))
    assert {name: key.default for name, key in described.items()} == flat
    assert described["rollout.top_p"].type == "a number greater than 0 and at most 1"
    assert described["training.critic_lr"].type == "a number of at least 0, or null"


def _flatten(section: Any, prefix: str = ""):
    for name in type(section).model_fields:
        value = getattr(section, name)
        if hasattr(type(value), "model_fields"):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
