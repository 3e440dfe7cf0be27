"""What the pages show is true: code runs or is part of a tested file, commands and keys exist, links lead somewhere."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import pytest

from siirl.cli.main import cli
from siirl.config import load
from siirl.config.paths import find_config
from tests.docs.pages import PAGES, ROOT, Block, blocks, code, table_cells

CHECKED = {
    ("python", "file:"),
    ("python", "run"),
    ("yaml", "file:"),
    ("yaml", "recipe"),
    ("toml", "file:"),
    ("toml", "expected"),
    ("bash", "file:"),
    ("console", ""),
}


def test_every_block_is_of_a_kind_that_a_test_looks_at() -> None:
    kinds = {(block.language, block.mark.split(" ")[0]): str(block) for block in blocks() if block.language != "text"}
    assert {kind: place for kind, place in kinds.items() if kind not in CHECKED} == {}


@pytest.mark.parametrize("block", blocks(mark="file: "), ids=str)
def test_a_shown_part_of_a_file_is_in_the_file(block: Block) -> None:
    rest = (ROOT / block.mark.removeprefix("file: ")).read_text()
    for part in block.text.split("# …\n"):
        before, found, rest = rest.partition(part)
        assert found, f"not there, or not in this order:\n{part}"
        assert before == "" or before.endswith("\n")


SMALL = """
model: {path: "tiny:qwen3:16:1:99"}
data: {source: "arithmetic:addition?digits=1", prompts_per_step: 4, max_prompt_tokens: 8}
rollout: {group_size: 2, max_new_tokens: 3}
warmup: [{pipeline: sft, training: {steps: 1}}]
"""


@pytest.mark.parametrize("block", blocks("python", "run"), ids=str)
def test_a_shown_program_runs(block: Block, tmp_path: Path) -> None:
    """With a small recipe under the name of the one it uses: what is tested is the program."""
    (tmp_path / "quickstart").write_text(SMALL)
    (tmp_path / "program.py").write_text(block.text)
    done = subprocess.run([sys.executable, "program.py"], cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize("block", blocks("yaml", "recipe"), ids=str)
def test_a_shown_recipe_is_accepted(block: Block, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(block.text)
    load(tmp_path / "recipe.yaml")


COMMANDS = [(line, block) for block in blocks("console") for line in block.text.splitlines()]


@pytest.mark.parametrize(("line", "block"), COMMANDS, ids=lambda value: str(value))
def test_a_shown_command_exists(line: str, block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    program, *arguments = line.split()
    if program == "make":
        assert set(arguments) <= set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    elif program == "pip":
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        extras = project["optional-dependencies"]
        wanted = {re.split(r"[<>=;]", need)[0] for needs in extras.values() for need in needs}
        known = {"torch", ".", *wanted, *(f".[{extra}]" for extra in extras)}
        assert arguments[0] == "install"
        assert {argument for argument in arguments[1:] if argument != "--no-deps"} <= known
    else:
        if program == "torchrun":
            program, *arguments = arguments[arguments.index("siirl") :]
        assert program == "siirl"
        command = cli.commands[arguments[0]]
        given = command.make_context(arguments[0], arguments[1:]).params
        if "config" in given:
            load(given["config"], given["overrides"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_recipes_named_in_the_text_exist(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for name in re.findall(r"`siirl (?:train|plan) ([a-z][\w./-]*)", page.read_text()):
        find_config(name)


def test_the_readme_lists_the_verbs() -> None:
    listed = [code(cell)[0].split() for cell in table_cells("README.md", "## Commands")]
    assert [words[1] for words in listed] == list(cli.commands)
    options = {
        name
        for command in cli.commands.values()
        for p in command.params
        if isinstance(p, click.Option)
        for name in p.opts
    }
    assert set(re.findall(r"`(--[\w-]+)`", (ROOT / "README.md").read_text())) <= options


def test_the_extras_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    shown = re.search(r"^Extras:.*?\n\n", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    assert shown
    for name in code(shown[0]):
        names = name.partition("[")[2].partition("]")[0].split(",") if "[" in name else [name]
        assert set(names) <= set(project["optional-dependencies"])


def test_the_table_of_keys_is_that_of_the_schema() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text()
    written = runpy.run_path(str(ROOT / "docs" / "generate.py"))["page"](page)
    assert page == written, "run: python docs/generate.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_named_files_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []
    named = re.findall(r"`((?:siirl|configs|docs|kernels|backends|tests)/[\w./-]+)`", text)
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_shipped_rewards_and_pipelines_are_the_ones_on_the_page() -> None:
    from siirl.rewards.registry import BUILT_IN

    heading = "## Rewards: `reward.function`"
    assert {code(cell)[0] for cell in table_cells("docs/configuration.md", heading)} == {*BUILT_IN, "auto"}
    page = (ROOT / "docs" / "configuration.md").read_text()
    shown = re.search(r"name of a shipped pipeline \(([^)]*)\)", page)
    assert shown
    assert sorted(code(shown[1])) == sorted(file.stem for file in (ROOT / "configs" / "pipelines").glob("*.yaml"))


def test_the_ops_are_the_ones_on_the_page() -> None:
    from siirl.dag.ops import _OPS

    shown = re.search(r"^The ops: (.*?)\. ", (ROOT / "docs" / "extend.md").read_text(), re.DOTALL | re.MULTILINE)
    assert shown
    assert set(code(shown[1])) - {"python:…"} == {name for name, spec in _OPS.items() if spec.function is None}
