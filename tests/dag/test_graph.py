"""The two ways to make a graph give the same graph, and a wrong entry is named with its line."""

from __future__ import annotations

import subprocess
import sys

import pytest

from siirl.dag import Graph, Read
from siirl.errors import RequestError

TEXT = """\
name: mine
description: A pipeline.
algorithm: {kl_coef: 1e-3}
nodes:
  - id: data
    op: data
    writes: [sample_id, group_id, slot, prompt_ids, row]
  - id: rollout
    op: rollout
    model: actor
    reads: [prompt_ids]
    writes: [response_ids, rollout_log_probs]
  - {id: probe, op: "python:mine:probe", layout: tokens, reads: {text: response_ids, extra: extra?},
     writes: {out: score}, after: [rollout], when: step > 2, every: logging.samples_every, params: {a: [1, {b: null}]}}
  - {id: more, op: "python:mine.py:more", when: true, every: 3, reads: [response_ids, score?], writes: [extra]}
"""


def build() -> Graph:
    return (
        Graph("mine", description="A pipeline.", algorithm={"kl_coef": 0.001})
        .node("data", op="data", writes=["sample_id", "group_id", "slot", "prompt_ids", "row"])
        .node(
            "rollout", op="rollout", model="actor", reads=["prompt_ids"], writes=["response_ids", "rollout_log_probs"]
        )
        .node(
            "probe",
            op="python:mine:probe",
            layout="tokens",
            reads={"text": "response_ids", "extra": "extra?"},
            writes={"out": "score"},
            after=["rollout"],
            when="step > 2",
            every="logging.samples_every",
            params={"a": (1, {"b": None})},
        )
        .node("more", op="python:mine.py:more", when=True, every=3, reads=["response_ids", "score?"], writes=["extra"])
    )


def test_yaml_and_python_give_the_same_graph() -> None:
    graph = Graph.from_text(TEXT, "p.yaml")
    assert graph == build()
    assert graph.nodes[2].reads == {"text": Read("response_ids"), "extra": Read("extra", optional=True)}
    assert graph.nodes[3].when == "True"


def test_yaml_round_trip() -> None:
    assert Graph.from_text(build().to_yaml()) == build()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("name: mine", "nmae: mine", "p.yaml:1: unknown key 'nmae'; did you mean 'name'?"),
        ("name: mine", "name: 3", "p.yaml:1: 'name' is not text"),
        ("kl_coef:", "kl_coeff:", "p.yaml:3: unknown key 'algorithm.kl_coeff'; did you mean 'kl_coef'?"),
        ("1e-3", "-1", "p.yaml:3: algorithm.kl_coef: "),
        ("1e-3", "'1'", "p.yaml:3: algorithm.kl_coef: "),
        ("{kl_coef: 1e-3}", "grpo", "p.yaml:3: 'algorithm' is not keys with values"),
        (
            "    model: actor",
            "    modle: actor",
            "p.yaml:10: node 'rollout': unknown key 'modle'; did you mean 'model'?",
        ),
        ("model: actor", "model: acter", "p.yaml:10: node 'rollout': unknown model 'acter'; did you mean 'actor'?"),
        ("    op: data", "", "p.yaml:5: node 'data': needs 'op', a text"),
        ("op: data", "op: [data]", "p.yaml:6: node 'data': 'op' is not text"),
        ("id: rollout", "id: roll out", "p.yaml:8: node 'roll out': an id is letters"),
        ("reads: [prompt_ids]", "reads: prompt_ids", "p.yaml:11: node 'rollout': 'reads' is neither a list"),
        ("[prompt_ids]", "[prompt-ids]", "p.yaml:11: node 'rollout': 'reads' has 'prompt-ids', which is not a name"),
        ("[prompt_ids]", "[3]", "p.yaml:11: node 'rollout': 'reads' has 3, which is not a name of a column"),
        ("[prompt_ids]", "[prompt_ids, prompt_ids?]", "p.yaml:11: node 'rollout': 'reads' has 'prompt_ids' twice"),
        (
            "[response_ids, rollout",
            "[response_ids?, rollout",
            "p.yaml:12: node 'rollout': 'writes' has 'response_ids?'",
        ),
        ("{out: score}", "{out: score, b: score}", "p.yaml:14: node 'probe': 'writes' has 'score' twice"),
        ("layout: tokens", "layout: token", "p.yaml:13: node 'probe': unknown layout 'token'; did you mean 'tokens'?"),
        ("layout: tokens", "layout: rows", "p.yaml:13: node 'probe': unknown layout 'rows'; did you mean 'groups'?"),
        ("after: [rollout]", "after: rollout", "p.yaml:14: node 'probe': 'after' is not a list of node ids"),
        ("step > 2", "step >", "p.yaml:14: node 'probe': 'step >' is not a condition"),
        ("step > 2", "print(1)", "p.yaml:14: node 'probe': 'print(1)' is not allowed in a condition"),
        ("step > 2", "[1]", "p.yaml:14: node 'probe': 'when' is not a condition"),
        ("every: 3", "every: -3", "p.yaml:15: node 'more': 'every' is -3, neither a number of steps nor"),
        ("every: 3", "every: true", "p.yaml:15: node 'more': 'every' is True, neither"),
        ("every: 3", "every: often", "p.yaml:15: node 'more': 'every' is 'often', neither"),
        ("{a: [1, {b: null}]}", "[a]", "p.yaml:14: node 'probe': 'params' is not keys with values"),
        ("{a: [1, {b: null}]}", "{a: .inf}", "p.yaml:14: node 'probe': 'params' is not plain data"),
    ],
)
def test_a_wrong_entry_is_named_with_its_line(old: str, new: str, message: str) -> None:
    assert old in TEXT
    with pytest.raises(RequestError) as error:
        Graph.from_text(TEXT.replace(old, new, 1), "p.yaml")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_the_line_of_one_read_among_many(parse) -> None:
    with pytest.raises(RequestError, match=r"^p.yaml:6: node 'a': 'reads' has 'x y'"):
        parse("nodes:\n  - id: a\n    op: b\n    reads:\n      - x\n      - x y\n")


@pytest.mark.parametrize("text", ["name: x\n", "nodes: []\n", "nodes: {a: 1}\n", "nodes: [1]\n", ""])
def test_a_pipeline_has_nodes(text: str) -> None:
    with pytest.raises(RequestError, match="node"):
        Graph.from_text(text)


def test_python_mistakes_name_the_pipeline_and_the_node() -> None:
    with pytest.raises(RequestError, match=r"^pipeline 'p': node 'a': unknown layout 'x'"):
        Graph("p").node("a", op="b", layout="x")  # type: ignore[arg-type]
    with pytest.raises(RequestError, match=r"^pipeline 'p': node 'a': 'params' is not plain data"):
        Graph("p").node("a", op="b", params={"f": print})


def test_an_unknown_pipeline_is_refused_with_the_nearest() -> None:
    with pytest.raises(RequestError, match="did you mean 'grpo'"):
        Graph.from_yaml("grop")
    with pytest.raises(RequestError, match="missing.yaml"):
        Graph.from_yaml("some/missing.yaml")


def test_planning_imports_no_torch() -> None:
    code = "import sys, siirl.dag as d; d.Graph.from_yaml('ppo'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
