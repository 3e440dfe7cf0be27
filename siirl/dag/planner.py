"""The planner: from a pipeline, a configuration and a number of workers to each worker's serial plan.

A pure function: every worker computes its own plan and all of them agree. After the checks of single nodes, it

1. drops the nodes whose condition is settled and false, and settles every remaining input (`conditions`);
2. derives the edges and orders the nodes so that each waits for all of its inputs;
3. inserts a `redistribute` where the layout changes;
4. walks backwards to find where each column is read last: redistribution takes along only what is still read, and a
   `drop` follows the last reader.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from functools import partial

from siirl.config.schema import Config
from siirl.dag.checks import at, check_nodes
from siirl.dag.conditions import Dropped, Live, select
from siirl.dag.graph import Graph
from siirl.dag.ops import ROW_IDS
from siirl.dag.plan import Layout, Step, WorkerPlan, rollout_layout, training_layout
from siirl.errors import RequestError


def plan(graph: Graph, config: Config, workers: int) -> list[WorkerPlan]:
    """Every worker's plan, by rank. Raises like `plan_worker`."""
    steps, models = plan_steps(graph, config, workers)
    return [WorkerPlan(rank, workers, graph.name, steps, models) for rank in range(workers)]


def plan_worker(graph: Graph, config: Config, workers: int, rank: int) -> WorkerPlan:
    """The plan of worker ``rank`` of ``workers``.

    Raises:
        RequestError: the pipeline cannot work; ``FILE:LINE: node 'x': what is wrong``.
    """
    assert 0 <= rank < workers, f"rank {rank} of {workers} workers"
    steps, models = plan_steps(graph, config, workers)
    return WorkerPlan(rank, workers, graph.name, steps, models)


def plan_steps(graph: Graph, config: Config, workers: int) -> tuple[tuple[Step, ...], tuple[str, ...]]:
    """The steps and the models of a plan, which are the same for every rank."""
    check_nodes(graph)
    live, dropped = select(graph, config)
    edges = _connect(live, dropped)
    order = _sort(live, edges)
    _check_order(live, order, edges)
    items = [live[name] for name in order]
    layouts = _layouts(items, config, workers)
    steps = _assemble(items, layouts, moving=True)  # for one worker too: a pipeline is right or wrong for any number
    if workers == 1:
        steps = _assemble(items, layouts, moving=False)
    models = tuple(dict.fromkeys(step.model for step in steps if step.model is not None))
    return tuple(steps), models


def _connect(live: dict[str, Live], dropped: dict[str, Dropped]) -> dict[str, set[str]]:
    """What each node waits for: the writers of its columns, the source of the rows it adds to, and what `after` names;
    in place of a dropped node, what that one waits for."""
    sources = {name for name, item in live.items() if item.spec.rows == "source"}
    writers = {column: item.node.id for item in live.values() for column in item.node.writes.values()}

    def resolve(names: Iterable[str], seen: frozenset[str]) -> set[str]:
        found: set[str] = set()
        for name in names:
            if name in live:
                found.add(name)
            elif name not in seen:
                node = dropped[name].node
                found |= {writers[read.column] for read in node.reads.values() if read.column in writers}
                found |= resolve(node.after, seen | {name})
        return found

    edges = {}
    for name, item in live.items():
        inputs = {writers[column] for column in item.columns}
        if name not in sources and (item.columns or item.node.writes):
            inputs |= sources
        edges[name] = inputs | resolve(item.node.after, frozenset())
    return edges


def _sort(live: dict[str, Live], edges: dict[str, set[str]]) -> list[str]:
    """Order the nodes by counting the inputs that each still waits for.

    Of those that could run next the earliest in the file runs, and one of another layout only when no other is left:
    with two layouts, no order that begins in the same one switches less often.
    """
    position = {name: index for index, name in enumerate(live)}
    waiting = {name: len(inputs) for name, inputs in edges.items()}
    followers: dict[str, list[str]] = defaultdict(list)
    for name, inputs in edges.items():
        for other in inputs:
            followers[other].append(name)
    ready: dict[str | None, list[tuple[int, str]]] = {item.split: [] for item in live.values()}

    def push(name: str) -> None:
        heapq.heappush(ready[live[name].split], (position[name], name))

    for name in live:
        if not waiting[name]:
            push(name)
    order: list[str] = []
    current: str | None = None
    while any(ready.values()):
        here = [queue[0] for split, queue in ready.items() if queue and split in (None, current)]
        name = min(here or [queue[0] for queue in ready.values() if queue])[1]
        heapq.heappop(ready[live[name].split])
        current = live[name].split or current
        order.append(name)
        for follower in followers[name]:
            waiting[follower] -= 1
            if not waiting[follower]:
                push(follower)
    if len(order) < len(live):
        raise _cycle(live, edges, set(live) - set(order))
    return order


def _cycle(live: dict[str, Live], edges: dict[str, set[str]], stuck: set[str]) -> RequestError:
    """Walk back from the first stuck node until one repeats: every stuck node waits for another."""
    names = list(live)
    path = [next(name for name in names if name in stuck)]
    while True:
        previous = min((name for name in edges[path[-1]] if name in stuck), key=names.index)
        if previous in path:
            break
        path.append(previous)
    ring = path[path.index(previous) :][::-1]
    start = min(range(len(ring)), key=lambda index: names.index(ring[index]))
    ring = ring[start:] + ring[:start]
    return live[ring[0]].node.error(f"the nodes wait for each other in a cycle: {' → '.join([*ring, ring[0]])}")


def _check_order(live: dict[str, Live], order: list[str], edges: dict[str, set[str]]) -> None:
    """What reads columns has a place before or after each node that changes the rows, and what uses a model before or
    after each node that trains it: neither is left to the order of the file."""
    bit = {name: 1 << index for index, name in enumerate(order)}
    before: dict[str, int] = {}
    for name in order:
        before[name] = bit[name]
        for other in edges[name]:
            before[name] |= before[other]
    changers = [item for item in live.values() if item.spec.trains or item.spec.rows in ("expand", "drop")]
    for item in live.values():
        for changer in changers:
            name, other = item.node.id, changer.node.id
            effect = _effect(changer, item)
            if effect and not before[name] & bit[other] and not before[other] & bit[name]:
                raise item.node.error(
                    f"may run before or after node '{other}', which {effect}; "
                    f"say which: 'after: [{other}]' here, or 'after: [{name}]' there"
                )


def _effect(changer: Live, item: Live) -> str | None:
    """What ``changer`` does to something that ``item`` uses."""
    if changer.spec.rows in ("expand", "drop") and (item.columns or item.node.writes):
        return "changes the rows"
    if changer.spec.trains and changer.node.model == item.node.model:
        return f"trains the {item.node.model}"
    return None


def _layouts(items: Iterable[Live], config: Config, workers: int) -> dict[str, Layout]:
    """The layouts in use, by split."""
    layouts = {}
    for item in items:
        if item.split == "groups":
            layouts["groups"] = at(item.node, "layout", partial(rollout_layout, config, workers))
        elif item.split == "tokens" and "tokens" not in layouts:
            layouts["tokens"] = at(item.node, "layout", partial(training_layout, config, workers))
    return layouts


def _assemble(order: list[Live], layouts: dict[str, Layout], *, moving: bool) -> list[Step]:
    """The steps: nodes in order, a `redistribute` where the layout changes, a `drop` after each last reader."""
    steps: list[Step] = []
    items: list[Live] = []
    current: Layout | None = None
    for item in order:
        target = layouts[item.split] if item.split else current
        if moving and current is not None and target != current:
            steps.append(Step("redistribute", f"redistribute:{item.node.id}", source=current, target=target))
            items.append(item)
        steps.append(_node_step(item, target))
        items.append(item)
        current = target
    return _with_lifetimes(steps, items)


def _node_step(item: Live, target: Layout | None) -> Step:
    node = item.node
    return Step(
        "node",
        node.id,
        op=node.op,
        model=node.model,
        params=dict(node.params),
        reads=dict(item.reads),
        writes=dict(node.writes),
        every=item.every,
        when=item.when,
        target=target,
    )


def _with_lifetimes(steps: list[Step], items: list[Live]) -> list[Step]:
    """Walk backwards with the set of columns still read. ``items[i]`` is the node of, or right after, ``steps[i]``."""
    written = dict.fromkeys(column for item in items for column in item.node.writes.values())
    place = {column: index for index, column in enumerate(written)}
    needed: set[str] = set()
    moving: Live | None = None
    result: list[Step] = []
    for step, item in zip(reversed(steps), reversed(items), strict=True):
        if step.kind == "redistribute":
            if needed:
                result.append(replace(step, fields=_ordered(needed & place.keys(), place)))
                needed = needed | set(ROW_IDS)
                moving = item
            continue
        new = set(step.writes.values())
        ended = (item.columns | new) - needed
        if ended:
            result.append(Step("drop", f"drop:{step.id}", fields=_ordered(ended, place), target=step.target))
        result.append(step)
        needed = needed - new | item.columns
    if needed:
        assert moving is not None, "every other column has a writer before its readers"
        raise moving.node.error(
            f"runs in another layout than the node before it, and moving rows needs the columns {', '.join(ROW_IDS)}; "
            f"no node before it writes '{min(needed)}'",
            "layout",
        )
    return result[::-1]


def _ordered(columns: set[str], place: dict[str, int]) -> tuple[str, ...]:
    return tuple(sorted(columns, key=place.__getitem__))
