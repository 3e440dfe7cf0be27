"""Which nodes take part: those whose condition allows it and, of pure ones, those whose columns somebody reads.

Also which inputs remain, and which columns may be absent at a step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

from siirl.config.schema import Config
from siirl.dag.checks import at
from siirl.dag.expressions import decide, lookup
from siirl.dag.graph import Graph, Node
from siirl.dag.ops import OpSpec, find_op
from siirl.errors import RequestError


@dataclass(frozen=True)
class Live:
    """A node that takes part: its op's spec, its condition settled as far as it can be, its absent inputs removed."""

    node: Node
    spec: OpSpec
    every: int
    when: str | None
    reads: dict[str, str]
    """Formal name -> column; an optional one only when somebody writes it."""
    implicit: tuple[str, ...] = ()

    @property
    def split(self) -> str | None:
        """The layout it runs in; None: any."""
        return self.node.layout or self.spec.layout

    @property
    def columns(self) -> set[str]:
        """All columns it uses but does not write."""
        return {*self.reads.values(), *self.implicit}


@dataclass(frozen=True)
class Dropped:
    """A node that is left out, by its condition or because nobody reads what it writes, and why."""

    node: Node
    reason: str


def select(graph: Graph, config: Config) -> tuple[dict[str, Live], dict[str, Dropped]]:
    """Settle conditions; split the nodes into those that take part and those that are dropped, by id."""
    dropped: dict[str, Dropped] = {}
    conditions: dict[str, tuple[int, str | None]] = {}
    for node in graph.nodes:
        every, when, reason = _condition(node, config)
        if reason is None:
            conditions[node.id] = every, when
        else:
            dropped[node.id] = Dropped(node, reason)
    writers = _writers(node for node in graph.nodes if node.id in conditions)
    missing = {column: lost for lost in dropped.values() for column in lost.node.writes.values()}
    live: dict[str, Live] = {}
    for node in graph.nodes:
        if node.id not in conditions:
            continue
        reads = {}
        for formal, read in node.reads.items():
            if read.column in writers:
                reads[formal] = read.column
            elif not read.optional:
                lost = missing[read.column]
                raise node.error(
                    f"reads '{read.column}', but node '{lost.node.id}', which writes it, is dropped: {lost.reason}; "
                    f"give both the same condition, or mark the read as optional: '{read.column}?'",
                    "reads",
                    formal,
                )
        spec = find_op(node.op)
        implicit = tuple(column for column in spec.implicit if column in writers)
        live[node.id] = Live(node, spec, *conditions[node.id], reads, implicit)
    if not live:
        raise RequestError(f"{graph.place}: every node is dropped by its condition")
    for item in live.values():
        _check_condition(item, live, writers)
    _leave_out_unread(live, dropped)
    return live, dropped


def _leave_out_unread(live: dict[str, Live], dropped: dict[str, Dropped]) -> None:
    """Move pure nodes whose columns no live node reads to ``dropped``; then those that only they read, and so on."""
    readers = Counter(column for item in live.values() for column in item.columns)
    waiting = list(live)
    while waiting:
        item = live.get(name := waiting.pop())
        if item is None or not item.spec.pure or any(readers[column] for column in item.node.writes.values()):
            continue
        columns = ", ".join(f"'{column}'" for column in item.node.writes.values())
        dropped[name] = Dropped(item.node, f"no node that takes part reads {columns}")
        del live[name]
        readers.subtract(item.columns)
        waiting += [other for other, kept in live.items() if item.columns & {*kept.node.writes.values()}]


def _condition(node: Node, config: Config) -> tuple[int, str | None, str | None]:
    """`every` as a number, `when` if it depends on the step, and the reason if the node is dropped."""
    every = node.every
    if isinstance(every, str):
        every = at(node, "every", partial(lookup, config, every))
        if not isinstance(every, int) or isinstance(every, bool) or every < 0:
            raise node.error(f"'every' is {node.every}, which is {every!r}, not a number of steps", "every")
    always = node.when is None or at(node, "when", partial(decide, node.when, config))
    reason = None
    if every == 0:
        reason = f"'every' is {node.every}, which is 0" if isinstance(node.every, str) else "'every' is 0"
    elif always is False:
        reason = f"'{node.when}' is false"
    return every, None if always else node.when, reason


def _writers(nodes: Iterable[Node]) -> dict[str, Node]:
    writers: dict[str, Node] = {}
    for node in nodes:
        for formal, column in node.writes.items():
            if column in writers:
                raise node.error(f"writes '{column}', which node '{writers[column].id}' writes too", "writes", formal)
            writers[column] = node
    return writers


def _check_condition(item: Live, live: dict[str, Live], writers: dict[str, Node]) -> None:
    """A column that is not written at every step is read at the same steps, or optionally."""
    node = item.node
    if (item.spec.rows == "source" or item.spec.repeats) and (item.every > 1 or item.when is not None):
        makes = "fills the step" if item.spec.repeats else "makes the rows"
        raise node.error(f"{makes}, which every step needs; it cannot have 'every' or a 'when' over 'step'")
    for formal, column in item.reads.items():
        writer = live[writers[column].id]
        covered = item.every % writer.every == 0 and writer.when in (None, item.when)
        if not covered and not node.reads[formal].optional:
            condition = writer.when or f"every {writer.every} steps"
            raise node.error(
                f"reads '{column}' at steps at which node '{writer.node.id}' does not write it ({condition}); "
                f"give both the same condition, or mark the read as optional: '{column}?'",
                "reads",
                formal,
            )
