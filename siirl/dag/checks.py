"""What must hold of a pipeline whatever the configuration: ids, ops and what they need, control edges, writers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TypeVar

from siirl.dag.graph import Graph, Node
from siirl.dag.ops import OpSpec, find_op
from siirl.errors import RequestError, did_you_mean

Result = TypeVar("Result")


def at(node: Node, key: str, compute: Callable[[], Result]) -> Result:
    """Run ``compute``, and give what it complains about the place of ``key``."""
    try:
        return compute()
    except RequestError as error:
        raise node.error(str(error), key) from error


def check_nodes(graph: Graph) -> None:
    """Check every node.

    Raises:
        RequestError: the first thing that is wrong, with the place of the key that says it.
    """
    ids = [node.id for node in graph.nodes]
    written = dict.fromkeys(column for node in graph.nodes for column in node.writes.values())
    seen: set[str] = set()
    for node in graph.nodes:
        if node.id in seen:
            raise node.error("the id is taken by an earlier node", "id")
        seen.add(node.id)
        _check_op(node, at(node, "op", partial(find_op, node.op)))
        for other in node.after:
            if other not in ids:
                raise node.error(f"'after' names '{other}', which is no node{did_you_mean(other, ids)}", "after")
        for formal, read in node.reads.items():
            if read.column not in written:
                hint = did_you_mean(read.column, written)
                raise node.error(f"reads '{read.column}', which no node writes{hint}", "reads", formal)


def _check_op(node: Node, spec: OpSpec) -> None:
    """Whether the node gives its op what the op needs, and nothing it does not know."""
    _check_fields(node, "reads", spec.reads, spec.open_reads)
    _check_fields(node, "writes", spec.writes, spec.open_writes)
    if node.model is None and spec.models and not spec.model_optional:
        raise node.error(f"op '{node.op}' needs a model: {' or '.join(spec.models)}", "op")
    if node.model is not None and node.model not in spec.models:
        allowed = f"uses {' or '.join(spec.models)}" if spec.models else "uses no model"
        raise node.error(f"op '{node.op}' {allowed}, not '{node.model}'", "model")
    if node.layout is not None and spec.fixed_layout and node.layout != spec.layout:
        raise node.error(f"op '{node.op}' runs in layout '{spec.layout}', not '{node.layout}'", "layout")
    if spec.whole_groups and "group_id" in node.reads and (node.layout or spec.layout) != "groups":
        raise node.error("reads 'group_id', so it needs whole groups: layout 'groups'", "layout")
    for name in node.params:
        if spec.params is not None and name not in spec.params:
            hint = did_you_mean(name, spec.params)
            raise node.error(f"op '{node.op}' has no parameter '{name}'{hint}", "params", name)
    problem = spec.check(node) if spec.check else None
    if problem:
        raise node.error(problem, "params")


def _check_fields(node: Node, key: str, known: Mapping[str, bool], is_open: bool) -> None:
    given = getattr(node, key)
    verb = {"reads": "read", "writes": "write"}[key]
    for formal in given:
        if formal not in known and not is_open:
            hint = did_you_mean(formal, known) or f"; it {verb}s {', '.join(known) or 'nothing'}"
            raise node.error(f"op '{node.op}' does not {verb} '{formal}'{hint}", key, formal)
    for formal, required in known.items():
        if required and formal not in given:
            raise node.error(f"op '{node.op}' must {verb} '{formal}'", key)
        if required and key == "reads" and given[formal].optional:
            raise node.error(f"op '{node.op}' cannot do without '{formal}'; drop its '?'", key, formal)
