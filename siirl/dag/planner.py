"""The planner: from a pipeline, a configuration and a number of workers to each worker's serial plan.

A pure function: every worker computes its own plan and all of them agree. After the checks of single nodes, it

1. drops the nodes whose condition is settled and false, settles every remaining input, and drops the pure nodes whose
   columns nobody is left to read (`conditions`);
2. derives the edges and orders the nodes so that each waits for all of its inputs;
3. inserts a `redistribute` where the layout changes;
4. walks backwards to find where each column is read last: redistribution takes along only what is still read, and a
   `drop` follows the last reader;
5. lets nodes that only look at the rows run while these move;
6. chooses how rows travel: through shared memory where all workers among whom they move are on one host.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial

from siirl.config.schema import Config
from siirl.dag.checks import at, check_nodes
from siirl.dag.conditions import Dropped, Live, select
from siirl.dag.graph import Graph
from siirl.dag.old_log_probs import check_old_log_probs
from siirl.dag.ops import ROW_IDS, find_op
from siirl.dag.plan import Layout, Placement, Role, Step, Table, WorkerPlan, rollout_layout, training_layout
from siirl.dag.router_replay import replay_routers
from siirl.errors import RequestError

Hosts = Sequence[int] | None
"""The number of each worker's host, by rank; None: all are on one."""


def plan(graph: Graph, config: Config, workers: int, hosts: Hosts = None) -> list[WorkerPlan]:
    """Every worker's plan, by rank. Raises like `plan_worker`."""
    return [replace(plan, rank=rank) for plan, ranks in plan_roles(graph, config, workers, hosts) for rank in ranks]


def plan_roles(graph: Graph, config: Config, workers: int, hosts: Hosts = None) -> list[tuple[WorkerPlan, range]]:
    """The distinct plans, each with the ranks that run it. Raises like `plan_worker`."""
    steps, _ = plan_steps(graph, config, workers, hosts)
    roles = Placement.of(config, workers).roles()
    return [(_of_role(steps, role, ranks[0], workers, graph.name), ranks) for role, ranks in roles]


def plan_worker(graph: Graph, config: Config, workers: int, rank: int, hosts: Hosts = None) -> WorkerPlan:
    """The plan of worker ``rank`` of ``workers``.

    Raises:
        RequestError: the pipeline cannot work; ``FILE:LINE: node 'x': what is wrong``.
    """
    assert 0 <= rank < workers, f"rank {rank} of {workers} workers"
    steps, _ = plan_steps(graph, config, workers, hosts)
    return _of_role(steps, Placement.of(config, workers).role(rank), rank, workers, graph.name)


def left_out(graph: Graph, config: Config) -> Table:
    """The nodes of a pipeline that take no part, and why. Raises like `plan_worker`."""
    check_nodes(graph)
    _, dropped = select(graph, config)
    rows = [(node.id, node.op, node.model or "", dropped[node.id].reason) for node in graph.nodes if node.id in dropped]
    return Table("left out", ("node", "op", "model", "why"), tuple(rows))


def _of_role(steps: tuple[Step, ...], role: Role, rank: int, workers: int, name: str) -> WorkerPlan:
    own = tuple(step for step in steps if role == "all" or step.role in ("all", role))
    return WorkerPlan(rank, workers, name, own, _models(own))


def _models(steps: Iterable[Step]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(step.model for step in steps if step.model is not None))


def plan_steps(
    graph: Graph, config: Config, workers: int, hosts: Hosts = None
) -> tuple[tuple[Step, ...], tuple[str, ...]]:
    """All steps and models of a pipeline: those of every worker, or of each role in a disaggregated placement."""
    check_nodes(graph)
    live, dropped = select(graph, config)
    check_old_log_probs(live.values(), config)
    live = replay_routers(live, config)
    edges = _connect(live, dropped)
    _close_round(live, edges)
    order = _sort(live, edges)
    _check_order(live, order, edges)
    items = [live[name] for name in order]
    place = Placement.of(config, workers)
    layouts = _layouts(items, config, place)
    roles = _roles(items, layouts, place)
    _check_partial(items, config, place)
    steps = _assemble(items, layouts, roles, moving=True)  # for one worker too: a pipeline is right for any number
    if workers == 1:
        steps = _assemble(items, layouts, roles, moving=False)
    elif config.data.overlap and not place.disaggregated:
        steps = _overlap(steps)
    return tuple(_with_transport(step, config, hosts) for step in steps), _models(steps)


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


def _close_round(live: dict[str, Live], edges: dict[str, set[str]]) -> None:
    """What a repeating node waits for is the round that it may run again; every other node waits for it."""
    repeating = [name for name, item in live.items() if item.spec.repeats]
    for other in repeating[1:]:
        raise live[other].node.error(f"repeats what comes before it, as node '{repeating[0]}' does; use one of them")
    for name in repeating:
        inside: set[str] = set()
        waiting = list(edges[name])
        while waiting:
            if (inner := waiting.pop()) not in inside:
                inside.add(inner)
                waiting += edges[inner]
        for item in (item for inner, item in live.items() if inner in inside):
            if item.spec.trains:
                raise item.node.error(f"trains the {item.node.model} in the round that node '{name}' repeats")
            if item.node.writes and (item.every > 1 or item.when is not None):
                raise item.node.error(
                    f"writes columns at some steps only, in the round that node '{name}' repeats: groups that are left "
                    "over for another step would lack them; leave out 'every' and the 'when' over 'step'"
                )
        for outer in live.keys() - inside - {name}:
            edges[outer].add(name)


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


def _layouts(order: Iterable[Live], config: Config, place: Placement) -> dict[str, Layout | None]:
    """Where each node runs, by its id; None before any rows are.

    Whole groups lie on the workers that generate, until the first node that trains: rows never go back there.
    """
    layouts: dict[str, Layout | None] = {}
    current: Layout | None = None
    training = False
    for item in order:
        if item.split == "tokens":
            training = True
            current = at(item.node, "layout", partial(training_layout, config, len(place.training)))
        elif item.split == "groups":
            ranks = place.training if training else place.rollout
            current = at(item.node, "layout", partial(rollout_layout, config, len(ranks), ranks.start))
        layouts[item.node.id] = current
    return layouts


def _roles(order: Iterable[Live], layouts: dict[str, Layout | None], place: Placement) -> dict[str, Role]:
    """Which workers run each node, by its id. Raises RequestError for one that has nowhere to run."""
    roles: dict[str, Role] = {}
    for item in order:
        layout = layouts[item.node.id]
        role: Role = "all"
        if item.node.op == "evaluate" and place.disaggregated:
            role = "rollout"
        elif item.node.op != "sync_weights" and place.disaggregated and layout is not None:
            role = "rollout" if layout.ranks == place.rollout else "training"
        if place.disaggregated and item.node.op == "dynamic_sampling":
            raise item.node.error("keeps groups from step to step where they are trained on; set placement=colocated")
        if role == "training" and item.node.op == "rollout":
            raise item.node.error(
                "generates after a node that trains, so with placement=disaggregated rows would have to go back; "
                "set placement=colocated"
            )
        if role == "rollout" and item.node.model and item.node.op not in ("rollout", "evaluate"):
            raise item.node.error(
                f"uses the {item.node.model} where workers only generate (placement=disaggregated); "
                "set 'layout: tokens' here, or placement=colocated"
            )
        roles[item.node.id] = role
    if place.disaggregated and not {"rollout", "training"} <= {*roles.values()}:
        raise RequestError("the pipeline has nothing for workers of their own to do; set placement=colocated")
    return roles


def _check_partial(order: Iterable[Live], config: Config, place: Placement) -> None:
    """Refuse to carry unfinished responses where nobody could go on with them."""
    if not config.rollout.partial:
        return
    key = "rollout.partial"
    if place.disaggregated:
        raise RequestError(
            f"{key} carries responses over on the workers that train; set {key}=0 or placement=colocated"
        )
    if config.rollout.engine != "native":
        raise RequestError(f"{key} needs rollout.engine=native, not {config.rollout.engine}; set {key}=0")
    for item in order:
        if item.node.op == "dynamic_sampling":
            raise item.node.error(f"has rounds of its own, across which nothing is carried; set {key}=0")


def _assemble(
    order: list[Live], layouts: dict[str, Layout | None], roles: dict[str, Role], *, moving: bool
) -> list[Step]:
    """The steps: nodes in order, a `redistribute` where the layout changes, a `drop` after each last reader."""
    steps: list[Step] = []
    items: list[Live] = []
    current: Layout | None = None
    for item in order:
        target, role = layouts[item.node.id], roles[item.node.id]
        if moving and current is not None and target is not None and target != current:
            between: Role = role if current.ranks == target.ranks else "all"
            name = f"redistribute:{item.node.id}"
            steps.append(Step("redistribute", name, source=current, target=target, role=between))
            items.append(item)
        steps.append(replace(_node_step(item, target), role=role))
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
            ending = _ordered(ended, place)
            result.append(Step("drop", f"drop:{step.id}", fields=ending, target=step.target, role=step.role))
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


def _overlap(steps: list[Step]) -> list[Step]:
    """Put the observers that come last before rows move behind that `redistribute`, to run during it."""
    result = list(steps)
    for index, step in enumerate(steps):
        if step.kind != "redistribute":
            continue
        first = index
        while first > 0 and (result[first - 1].kind == "drop" or _observes(result[first - 1])):
            first -= 1
        while result[first].kind == "drop":  # after a node that has to end before
            first += 1
        result[first : index + 1] = [replace(step, overlaps=index - first), *result[first:index]]
    return result


def _with_transport(step: Step, config: Config, hosts: Hosts) -> Step:
    """A `redistribute` with the way its rows travel. Raises RequestError where shared memory does not reach."""
    if step.kind != "redistribute":
        return step
    assert step.source is not None and step.target is not None
    wanted, among = config.data.transport, {*step.source.ranks, *step.target.ranks}
    count = 1 if hosts is None else len({hosts[rank] for rank in among})
    if wanted == "shared_memory" and count > 1:
        raise RequestError(
            f"data.transport is shared_memory, but rows move among workers of {count} hosts ({step.id}); set it to auto"
        )
    return replace(step, transport="shared_memory" if wanted != "collectives" and count == 1 else "collectives")


def _observes(step: Step) -> bool:
    return step.kind == "node" and find_op(step.op).observes


def _ordered(columns: set[str], place: dict[str, int]) -> tuple[str, ...]:
    return tuple(sorted(columns, key=place.__getitem__))
