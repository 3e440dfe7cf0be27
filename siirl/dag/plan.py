"""What the planner hands to a worker, and how a person sees it.

A `WorkerPlan` is plain data: it goes to JSON and comes back equal. The worker runs its steps one after another.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from siirl.config.memory import check_memory_keys
from siirl.dag.expressions import evaluate
from siirl.dag.ops import find_op
from siirl.errors import RequestError

if TYPE_CHECKING:
    from siirl.config.schema import Config
    from siirl.dag.graph import Graph

Split = Literal["groups", "tokens"]
Role = Literal["all", "rollout", "training"]
TransportName = Literal["collectives", "shared_memory"]

ENGINE_DEGREES: dict[str, tuple[str, ...]] = {
    "fsdp": ("tensor", "context", "expert"),
    "megatron": ("tensor", "context", "pipeline", "expert"),
    "native": (),
    "vllm": ("tensor",),
}
"""The degrees beside data parallel that an engine knows, by its name."""


@dataclass(frozen=True)
class Layout:
    """How the rows lie over the workers: `groups` keeps a prompt's rows together, `tokens` balances by length.

    The workers are `workers` of the run from `first` on. There are `data` shares of the rows, and all workers of a
    tensor, context and pipeline group hold the same share.
    """

    split: Split
    workers: int
    data: int
    tensor: int = 1
    context: int = 1
    pipeline: int = 1
    expert: int = 1
    first: int = 0

    @property
    def ranks(self) -> range:
        """The workers of the run that have rows in this layout."""
        return range(self.first, self.first + self.workers)

    def shares(self) -> list[list[int]]:
        """The workers of each share. Ranks run through tensor, context, data, pipeline, the first one fastest."""
        inner = self.tensor * self.context
        return [
            [self.first + (p * self.data + d) * inner + i for p in range(self.pipeline) for i in range(inner)]
            for d in range(self.data)
        ]

    def __str__(self) -> str:
        inner = {"tensor": self.tensor, "context": self.context, "pipeline": self.pipeline, "expert": self.expert}
        degrees = [f"{name} {degree}" for name, degree in inner.items() if degree > 1]
        return f"{self.split} ({', '.join([f'data {self.data}', *degrees])})" if degrees else self.split


@dataclass(frozen=True)
class Step:
    """One step of a worker.

    `node` runs an op, in the layout `target`. `redistribute` moves the rows from `source` to `target` and takes the
    columns `fields` along, which are all that is read afterwards, by `transport`; meanwhile the next `overlaps` steps
    run on the rows as they lay. `drop` frees the columns `fields`. A column whose node was not due is absent: both
    leave it out. `role` says which workers have the step in their plans.
    """

    kind: Literal["node", "redistribute", "drop"]
    id: str
    op: str = ""
    model: str | None = None
    params: dict[str, Any] = field(default_factory=dict)
    reads: dict[str, str] = field(default_factory=dict)
    writes: dict[str, str] = field(default_factory=dict)
    every: int = 1
    when: str | None = None
    fields: tuple[str, ...] = ()
    source: Layout | None = None
    target: Layout | None = None
    overlaps: int = 0
    transport: TransportName | None = None
    role: Role = "all"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"fields": list(self.fields)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Step:
        layouts = {key: None if data[key] is None else Layout(**data[key]) for key in ("source", "target")}
        return cls(**{**data, "fields": tuple(data["fields"]), **layouts})


@dataclass(frozen=True)
class WorkerPlan:
    """The serial pipeline of one worker, and the models it holds."""

    rank: int
    workers: int
    pipeline: str
    steps: tuple[Step, ...]
    models: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        steps = [step.to_dict() for step in self.steps]
        return {
            "rank": self.rank,
            "workers": self.workers,
            "pipeline": self.pipeline,
            "models": list(self.models),
            "steps": steps,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> WorkerPlan:
        steps = tuple(Step.from_dict(step) for step in data["steps"])
        return cls(data["rank"], data["workers"], data["pipeline"], steps, tuple(data["models"]))

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> WorkerPlan:
        return cls.from_dict(json.loads(text))


def all_plans_json(plans: Sequence[tuple[WorkerPlan, range]]) -> Iterator[str]:
    """A JSON list of every worker's plan, piece by piece: those of some ranks are alike but for the rank."""
    for plan, ranks in plans:
        rest = {key: value for key, value in plan.to_dict().items() if key != "rank"}
        body = json.dumps(rest).removeprefix("{")
        for rank in ranks:
            yield f'{"," if rank else "["}\n{{"rank": {rank}, {body}'
    yield "\n]"


def due(step: Step, number: int, config: Config) -> bool:
    """Whether a worker runs ``step`` in training step ``number``, counted from 1."""
    if number % step.every:
        return False
    return step.when is None or evaluate(step.when, config, number)


@dataclass(frozen=True)
class Table:
    """Text in rows and columns, for whatever shows it."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def describe(plans: Sequence[WorkerPlan]) -> list[Table]:
    """One table per distinct plan; its title says which workers run it."""
    groups: list[list[WorkerPlan]] = []
    for plan in plans:
        for group in groups:
            if plan.steps == group[0].steps and plan.models == group[0].models:
                group.append(plan)
                break
        else:
            groups.append([plan])
    return [_table(group[0], [plan.rank for plan in group[1:]]) for group in groups]


def describe_all(plan: WorkerPlan, ranks: range) -> Table:
    """The table of a plan that the workers of these ranks run."""
    return _table(plan, ranks[1:])


def _table(first: WorkerPlan, alike: Sequence[int]) -> Table:
    columns = ("#", "step", "op", "model", "layout", "reads", "writes", "moves or frees", "by", "when")
    return Table(_title(first, alike), columns, _rows(first.steps))


def _title(first: WorkerPlan, alike: Sequence[int]) -> str:
    models = f"holds {', '.join(first.models)}" if first.models else "holds no model"
    if not alike:
        return f"{first.pipeline}: worker {first.rank} of {first.workers}; {models}"
    if len(alike) > 1 and list(alike) == list(range(alike[0], alike[-1] + 1)):
        rest = f"workers {alike[0]} to {alike[-1]} are alike"
    else:
        rest = f"alike: {', '.join(str(rank) for rank in alike)}"
    return f"{first.pipeline}: worker {first.rank} of {first.workers}, {rest}; {models}"


def _rows(steps: Sequence[Step]) -> tuple[tuple[str, ...], ...]:
    rows = []
    for number, step in enumerate(steps, start=1):
        layout = str(step.target or "")
        if step.kind == "redistribute":
            layout = f"{step.source} → {step.target}"
        conditions = [f"every {step.every} steps"] * (step.every > 1) + [step.when] * (step.when is not None)
        if step.kind == "node" and find_op(step.op).repeats:
            conditions.append(f"repeats 1 to {number}")
        if step.overlaps:
            conditions.append(f"during {number + 1}" + f" to {number + step.overlaps}" * (step.overlaps > 1))
        rows.append(
            (
                str(number),
                step.id,
                step.op or step.kind,
                step.model or "",
                layout,
                _mapping(step.reads),
                _mapping(step.writes),
                ", ".join(step.fields),
                (step.transport or "").replace("_", " "),
                " and ".join(str(condition) for condition in conditions),
            )
        )
    return tuple(rows)


def _mapping(names: Mapping[str, str]) -> str:
    return ", ".join(c if f == c else f"{c} as {f}" for f, c in names.items())


@dataclass(frozen=True)
class Placement:
    """Which workers train, and which generate: the same, or the first and the last ones."""

    training: range
    rollout: range

    @classmethod
    def of(cls, config: Config, workers: int) -> Placement:
        """`placement`, `rollout.workers` of a run.

        Raises:
            RequestError: the workers cannot be parted so.
        """
        if config.placement == "colocated":
            if config.rollout.max_staleness:
                raise RequestError(
                    f"rollout.max_staleness is {config.rollout.max_staleness}, but with placement=colocated the same "
                    "workers generate and train in turn; set placement=disaggregated"
                )
            return cls(range(workers), range(workers))
        generating = config.rollout.workers or max(1, workers // 2)
        if generating >= workers:
            raise RequestError(
                f"placement is disaggregated, and with {generating} of {workers} workers generating none is left to "
                f"train; set workers={generating + 1} or more"
            )
        return cls(range(workers - generating), range(workers - generating, workers))

    @property
    def disaggregated(self) -> bool:
        return self.training != self.rollout

    def role(self, rank: int) -> Role:
        """``all`` where every worker does everything."""
        if not self.disaggregated:
            return "all"
        return "rollout" if rank in self.rollout else "training"

    def roles(self) -> list[tuple[Role, range]]:
        """The distinct roles and their ranks, in the order of ranks."""
        if not self.disaggregated:
            return [("all", self.training)]
        return [("training", self.training), ("rollout", self.rollout)]


def training_layout(config: Config, workers: int) -> Layout:
    """The layout of training: `training.parallel`, with data parallel over all workers that are left.

    Raises:
        RequestError: the degrees do not make up ``workers``.
    """
    parallel = config.training.parallel
    inner = _inner(config)
    data = workers // inner if parallel.data is None else parallel.data
    if data * inner != workers:
        degrees = f"tensor {parallel.tensor} x context {parallel.context} x pipeline {parallel.pipeline}"
        fix = (
            f"training.parallel.data={workers // inner}" if workers % inner == 0 else f"workers={max(data, 1) * inner}"
        )
        raise RequestError(
            f"training.parallel: data {data} x {degrees} is {data * inner} workers, but the run has {workers}; "
            f"set {fix}"
        )
    _check_expert(config, data)
    return Layout("tokens", workers, data, parallel.tensor, parallel.context, parallel.pipeline, parallel.expert)


def _check_expert(config: Config, data: int) -> None:
    """Refuse an expert group that the workers of data parallel do not make up, or that the engine cannot combine."""
    parallel, key = config.training.parallel, "training.parallel.expert"
    if parallel.expert == 1 or config.training.engine != "fsdp":
        return
    for name in ("tensor", "context"):
        if getattr(parallel, name) > 1:
            raise RequestError(
                f"{key} is {parallel.expert}, but training.engine 'fsdp' does not combine it with {name} parallel; "
                f"set {key}=1 or training.parallel.{name}=1"
            )
    if config.training.sharding == "shard":
        raise RequestError(
            f"{key} is {parallel.expert}, but the experts of a group are not sharded further; set {key}=1 or "
            "training.sharding=replicate"
        )
    if data % parallel.expert:
        raise RequestError(
            f"{key} is {parallel.expert}, which does not divide the {data} workers of data parallel; set {key}="
            f"{math.gcd(data, parallel.expert)}"
        )


def _inner(config: Config) -> int:
    """Workers that train on the same rows."""
    parallel = config.training.parallel
    return parallel.tensor * parallel.context * parallel.pipeline


def rollout_layout(config: Config, workers: int, first: int = 0) -> Layout:
    """The layout of generation: groups of `rollout.parallel.tensor` workers from ``first`` on, data parallel.

    Raises:
        RequestError: ``workers`` are not a number of such groups.
    """
    tensor = config.rollout.parallel.tensor
    if workers % tensor:
        raise RequestError(
            f"rollout.parallel.tensor is {tensor}, which does not divide the {workers} workers; "
            f"set workers={-(-workers // tensor) * tensor}"
        )
    return Layout("groups", workers, workers // tensor, tensor, first=first)


def check_batch(config: Config, workers: int, graph: Graph | None = None) -> None:
    """Refuse sizes that cannot work together, with the value that would.

    ``graph`` tells whether responses are generated; without it they are, `rollout.group_size` per prompt.

    Raises:
        RequestError: the first combination that cannot work.
    """
    data, training, updates = config.data, config.training, config.algorithm.mini_batches
    _check_degrees(config)
    _check_cut(config)
    place = Placement.of(config, workers)
    check_memory_keys(training, len(place.training))
    shares = max(training_layout(config, len(place.training)).data, rollout_layout(config, len(place.rollout)).data)
    holders = "workers" if shares == workers else "data-parallel groups"
    prompts = data.prompts_per_step
    if prompts < shares:
        fewer = f" or workers={prompts}" if shares == workers else ""
        raise RequestError(
            f"data.prompts_per_step is {prompts}, fewer than the {shares} {holders}; "
            f"set data.prompts_per_step={shares}{fewer}"
        )
    if prompts % updates:
        fitting = max(n for n in range(1, min(updates, prompts + 1)) if prompts % n == 0)
        raise RequestError(
            f"data.prompts_per_step is {prompts}, which algorithm.mini_batches={updates} does not divide; "
            f"set data.prompts_per_step={math.ceil(prompts / updates) * updates} or algorithm.mini_batches={fitting}"
        )
    group = _group_size(config, graph)
    samples = prompts // updates * group
    if samples < shares:
        fitting = max(n for n in range(1, updates) if prompts % n == 0 and prompts // n * group >= shares)
        raise RequestError(
            f"a mini-batch has {samples} samples ({prompts} prompts x {group} / {updates} mini-batches), "
            f"fewer than the {shares} {holders}; set algorithm.mini_batches={fitting}"
        )
    longest = data.max_prompt_tokens + config.rollout.max_new_tokens
    if training.micro_batch_tokens != "auto" and longest > training.micro_batch_tokens:
        raise RequestError(
            f"a sample can have {longest} tokens (data.max_prompt_tokens {data.max_prompt_tokens} + "
            f"rollout.max_new_tokens {config.rollout.max_new_tokens}), more than training.micro_batch_tokens="
            f"{training.micro_batch_tokens}; set training.micro_batch_tokens={longest} or more"
        )


def _check_degrees(config: Config) -> None:
    """Refuse a degree that the engine does not know."""
    engines = (
        ("training", config.training.engine, "trains", config.training.parallel),
        ("rollout", config.rollout.engine, "generates", config.rollout.parallel),
    )
    for section, engine, does, parallel in engines:
        for name, degree in parallel.degrees().items():
            if name not in ENGINE_DEGREES[engine] and degree > 1:
                key = f"{section}.parallel.{name}"
                known = ", ".join(("data", *ENGINE_DEGREES[engine]))
                raise RequestError(
                    f"{key} is {degree}, but {section}.engine '{engine}' {does} with {known} parallel only; set {key}=1"
                )


def _check_cut(config: Config) -> None:
    """Refuse what cannot be done with parameters that are cut over workers."""
    degrees = config.training.parallel
    cut = next((name for name in ("tensor", "expert") if getattr(degrees, name) > 1), None)
    training, rank = config.training, config.model.lora.rank
    refused = (
        ("model.lora.rank", rank, rank > 0, "0"),
        ("training.compile", "true", training.compile, "false"),
        ("training.optimizer", training.optimizer, training.optimizer == "adamw8bit", "adamw"),
    )
    for key, value, given, instead in refused:
        if cut is not None and given:
            here = f"training.parallel.{cut}"
            raise RequestError(
                f"{key} is {value}, which does not go with parameters cut by {here}={getattr(degrees, cut)}; set "
                f"{key}={instead} or {here}=1"
            )


def batch_table(config: Config, workers: int, graph: Graph | None = None) -> Table:
    """What a step is made of: prompts, samples, mini-batches, micro-batches; over all workers and on each."""
    algorithm, longest = config.algorithm, config.data.max_prompt_tokens + config.rollout.max_new_tokens
    group = _group_size(config, graph)
    prompts = config.data.prompts_per_step
    mini = prompts * group // algorithm.mini_batches
    updates = algorithm.mini_batches * algorithm.epochs
    budget = config.training.micro_batch_tokens
    shares = max(1, workers // _inner(config))
    micro = 0 if budget == "auto" else math.ceil(math.ceil(mini / shares) / max(1, budget // longest))
    rows = (
        ("prompts a step", f"{prompts:,}", _share(prompts, workers), "data.prompts_per_step"),
        ("samples a step", f"{prompts * group:,}", _share(prompts * group, workers), f"x {group} a prompt"),
        (
            "mini-batches a step",
            f"{updates:,}",
            f"{updates:,}",
            f"{algorithm.mini_batches} algorithm.mini_batches x {algorithm.epochs} algorithm.epochs",
        ),
        ("samples a mini-batch", f"{mini:,}", _share(mini, shares), "whole groups, shared out by tokens"),
        (
            "micro-batches a mini-batch",
            f"up to {micro * shares:,}" if micro else "as memory allows",
            f"up to {micro:,}" if micro else "as memory allows",
            f"{budget if micro == 0 else f'{budget:,}'} training.micro_batch_tokens, samples of up to {longest:,}",
        ),
    )
    return Table("batch sizes", ("", "all workers", "each worker", "from"), rows)


def _group_size(config: Config, graph: Graph | None) -> int:
    generated = graph is None or any(node.op == "rollout" for node in graph.nodes)
    return config.rollout.group_size if generated else 1


def _share(count: int, workers: int) -> str:
    return f"{count // workers:,}" if count % workers == 0 else f"{count // workers:,} to {-(-count // workers):,}"
