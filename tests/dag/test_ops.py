"""Ops of one's own: registered by a decorator, or named by module and function."""

from __future__ import annotations

import pytest

from siirl.config.schema import Config
from siirl.dag import find_op, op_names, plan_worker, python_target, register_op
from siirl.dag import ops as module
from siirl.errors import RequestError


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(module, "_OPS", dict(module._OPS))


def test_a_registered_op_is_planned_like_a_built_in_one(registry, graph_of) -> None:
    @register_op("shape", reads=["prompt_ids", "row?"], writes=["bonus"], params=["scale"], layout="tokens")
    def shape(batch):
        return batch

    assert find_op("shape").function is shape
    assert "shape" in op_names()
    graph = graph_of("{id: s, op: shape, reads: [prompt_ids], writes: [bonus], params: {scale: 2}}")
    step = plan_worker(graph, Config(), 2, 0).steps[-2]
    assert (step.op, step.params, step.target and step.target.split) == ("shape", {"scale": 2}, "tokens")
    with pytest.raises(RequestError, match="op 'shape' must read 'prompt_ids'"):
        plan_worker(graph_of("{id: s, op: shape, writes: [bonus]}"), Config(), 1, 0)
    with pytest.raises(RequestError, match="has no parameter 'scal'; did you mean 'scale'"):
        plan_worker(
            graph_of("{id: s, op: shape, reads: [prompt_ids], writes: [bonus], params: {scal: 2}}"), Config(), 1, 0
        )


@pytest.mark.parametrize("name", ["reward", "python:a:b"])
def test_a_name_is_not_taken_twice(name: str, registry) -> None:
    with pytest.raises(RequestError, match="the name is taken"):
        register_op(name)


@pytest.mark.parametrize(
    ("op", "target"),
    [
        ("python:package.module:function", ("package.module", "function")),
        ("python:rewards.py:bonus", ("rewards.py", "bonus")),
        ("python:/a b/rewards.py:bonus", ("/a b/rewards.py", "bonus")),
    ],
)
def test_python_targets(op: str, target: tuple[str, str]) -> None:
    assert python_target(op) == target


@pytest.mark.parametrize(
    "op", ["python:module", "python::f", "python:a.b:", "python:a-b:f", "python:a:f()", "module:f"]
)
def test_python_targets_that_are_none(op: str) -> None:
    with pytest.raises(RequestError, match="is not of the form"):
        python_target(op)
