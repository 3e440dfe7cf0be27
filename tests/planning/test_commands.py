"""`siirl plan --cluster`, `--search` and `siirl simulate`: what they print, what they refuse."""

from __future__ import annotations

import json
import shlex
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from siirl.cli.main import cli
from siirl.errors import RequestError

RECIPE = """
workers: 64
model: {path: qwen2.5-7b}
data: {prompts_per_step: 512}
rollout: {max_new_tokens: 1024}
training: {dtype: bfloat16, sharding: shard, micro_batch_tokens: 8192}
"""
CLUSTER = ["--cluster", "h200-128x8"]


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    (tmp_path / "r.yaml").write_text(RECIPE)
    return str(tmp_path / "r.yaml")


def run(*arguments: str) -> Result:
    result = CliRunner().invoke(cli, arguments, standalone_mode=False)
    if result.exception and not isinstance(result.exception, (RequestError, click.ClickException)):
        raise result.exception
    return result


def test_the_estimate_names_every_step_and_term_within_80_columns(recipe: str) -> None:
    result = run("plan", recipe, *CLUSTER)
    assert result.exception is None
    assert max(map(len, result.output.splitlines())) <= 80
    for word in (
        "weights",
        "optim",
        "grads",
        "copy",
        "cache",
        "activ",
        "head",
        "rollout",
        "→ update",
        "groups → tokens",
    ):
        assert word in result.output
    assert "64 workers on 128 x 8 NVIDIA H200 SXM" in result.output


def test_json_has_bytes_and_seconds_beside_the_plans(recipe: str) -> None:
    (stage,) = json.loads(run("plan", recipe, *CLUSTER, "--json").output)["stages"]
    assert stage["estimate"]["fits"] is True
    assert len(stage["plans"]) == 64
    update = next(s for s in stage["estimate"]["steps"] if s["id"] == "update")
    assert update["memory_bytes"]["optimiser"] == pytest.approx(12 * 7_615_616_512 / 64)
    assert update["seconds"] > 0


def test_what_does_not_fit_is_refused_with_the_term_and_with_keys_that_fit(recipe: str) -> None:
    result = run("plan", recipe, *CLUSTER, "training.sharding=replicate")
    assert isinstance(result.exception, RequestError)
    sentence = str(result.exception)
    assert "step 'update' needs 2" in sentence
    assert "the largest term is optimiser, 85.1 GiB" in sentence  # 12 bytes a parameter
    keys = shlex.split(sentence.rpartition("; ")[2].removesuffix(" would fit"))
    assert keys[0] == "training.sharding=shard"
    assert run("plan", recipe, *CLUSTER, *keys).exception is None


def test_engines_with_more_degrees_are_named_where_no_layout_of_these_fits(recipe: str) -> None:
    result = run("plan", recipe, *CLUSTER, "model.path=qwen2.5-72b")
    sentence = str(result.exception)
    assert "no layout that the engines 'fsdp' and 'native' know fits; training.engine=megatron" in sentence
    keys = shlex.split(sentence.rpartition("; ")[2].removesuffix(" would"))
    assert run("plan", recipe, *CLUSTER, "model.path=qwen2.5-72b", *keys).exception is None


def test_the_search_shows_the_fastest_of_the_layouts_that_fit(recipe: str) -> None:
    keys = ["training.engine=megatron", "rollout.engine=vllm", "--workers", "16", "data.prompts_per_step=128"]
    shown = run("plan", recipe, *CLUSTER, "--search", *keys)
    assert max(map(len, shown.output.splitlines())) <= 80
    (stage,) = json.loads(run("plan", recipe, *CLUSTER, "--search", "--json", *keys).output)["stages"]
    seconds = [layout["estimate"]["step_s"] for layout in stage["layouts"]]
    assert seconds == sorted(seconds) and len(seconds) > 10
    assert all(layout["estimate"]["fits"] for layout in stage["layouts"])
    degrees = [layout["keys"].get("training.parallel.tensor", 1) for layout in stage["layouts"]]
    assert max(degrees) == 4  # Qwen2.5-7B has four key/value heads
    best = [f"{key}={value}" for key, value in stage["layouts"][0]["keys"].items()]
    again = json.loads(run("plan", recipe, *CLUSTER, "--json", *keys, *best).output)["stages"][0]
    assert again["estimate"]["step_s"] == pytest.approx(seconds[0])


def test_simulate_prints_writes_and_draws(recipe: str, tmp_path: Path) -> None:
    plot = tmp_path / "s.svg"
    result = run("simulate", recipe, *CLUSTER, "--workers", "8,64", "--plot", str(plot), "--slow-share", "0.1")
    assert result.exception is None
    assert max(map(len, result.output.splitlines())) <= 80
    picture = ElementTree.parse(plot).getroot()
    lines = picture.findall("{http://www.w3.org/2000/svg}polyline")
    assert [len(line.attrib["points"].split()) for line in lines] == [2, 2, 2, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "r.yaml", "--search"], "--search needs a cluster"),
        (["simulate", "r.yaml"], "a simulation needs a cluster"),
        (["simulate", "r.yaml", *CLUSTER, "--workers", "8,x"], "--workers is '8,x'; write numbers"),
        (["plan", "r.yaml", *CLUSTER, "--response-tokens", "2000"], "--response-tokens is 2000, more than rollout.max"),
        (["plan", "r.yaml", *CLUSTER, "model.path=some/model"], "model.path 'some/model': its shape is not known"),
        (["plan", "r.yaml", *CLUSTER, "rollout.parallel.tensor=2"], "rollout.engine 'native' generates with data para"),
        (["plan", "r.yaml", "--cluster", "h20"], "no such cluster file: 'h20'"),
    ],
)
def test_wrong_requests(recipe: str, arguments: list[str], message: str) -> None:
    result = run(*(recipe if argument == "r.yaml" else argument for argument in arguments))
    assert isinstance(result.exception, RequestError)
    assert message in str(result.exception)
