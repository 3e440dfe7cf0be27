"""What each op of a pipeline reads and writes. The specs plan a pipeline; the worker holds the implementations.

A *formal* name is the name an op knows a column by; a node maps it to the column it uses (the same name unless the
pipeline says otherwise). An op of the form ``python:MODULE:FUNCTION`` or ``python:FILE.py:FUNCTION`` needs no spec: its
node declares what it reads and writes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from siirl.errors import RequestError, did_you_mean

if TYPE_CHECKING:
    from siirl.dag.graph import Node

MODELS = ("actor", "critic", "reference")
ENTRY_POINTS = "siirl.ops"

ROW_IDS = ("sample_id", "group_id", "slot")
"""The columns by which rows are told apart: what makes or moves rows needs them."""

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class OpSpec:
    """The planner's knowledge of one op.

    `rows` says what the op does to the rows of the batch: ``source`` makes them, ``expand`` repeats each one, ``drop``
    leaves some out, ``keep`` neither. `implicit` names columns that the op uses beside those its node lists.
    """

    name: str
    reads: Mapping[str, bool] = field(default_factory=dict)
    """Formal name -> whether it is required."""
    writes: Mapping[str, bool] = field(default_factory=dict)
    open_reads: bool = False
    """The node may read more than `reads` lists."""
    open_writes: bool = False
    models: tuple[str, ...] = ()
    """The models the op can use; empty: it uses none."""
    model_optional: bool = False
    layout: Literal["groups", "tokens"] | None = None
    """Where the op runs unless its node says otherwise; None: wherever the batch is."""
    fixed_layout: bool = False
    whole_groups: bool = False
    """An op that reads `group_id` needs all rows of a group on one worker."""
    rows: Literal["keep", "source", "expand", "drop"] = "keep"
    trains: bool = False
    """The op changes the model it uses."""
    observes: bool = False
    """The op only looks at the rows, so that it may run while they move to other workers."""
    pure: bool = False
    """The op does nothing but write its columns: one whose columns nobody reads is left out of the plan."""
    repeats: bool = False
    """The op may ask for another round: what it waits for runs again, then the op itself."""
    implicit: tuple[str, ...] = ()
    params: tuple[str, ...] | None = ()
    """Accepted keys of the node's `params`; None: any."""
    check: Callable[[Node], str | None] | None = None
    """What is wrong with a node beyond all this, as a clause, or None."""
    function: Callable[..., Any] | None = None
    """The implementation of an op made with `register_op`."""


def _check_data(node: Node) -> str | None:
    supervised = node.params.get("supervised", False)
    if not isinstance(supervised, bool):
        return f"params.supervised is {supervised!r}; use true or false"
    if supervised and "response_ids" not in node.writes:
        return "params.supervised is true, so it must write 'response_ids'"
    if not supervised and "response_ids" in node.writes:
        return "writes 'response_ids', which needs params: {supervised: true}"
    return None


_LOSSES: dict[str, tuple[str, tuple[str, ...]]] = {
    "policy": ("actor", ("advantages",)),
    "value": ("critic", ("values", "returns")),
    "sft": ("actor", ()),
}


def _check_update(node: Node) -> str | None:
    loss = node.params.get("loss", "policy")
    if not isinstance(loss, str) or loss not in _LOSSES:
        return f"params.loss is {loss!r}; use one of {', '.join(_LOSSES)}{did_you_mean(str(loss), _LOSSES)}"
    model, reads = _LOSSES[loss]
    if node.model != model:
        return f"params.loss '{loss}' trains the {model}, not the {node.model}"
    missing = [name for name in reads if name not in node.reads]
    return f"params.loss '{loss}' needs to read '{missing[0]}'" if missing else None


def _check_filter(node: Node) -> str | None:
    name = node.params.get("name")
    return None if isinstance(name, str) else "needs params: {name: FILTER}, a registered filter"


def _check_log_prob(node: Node) -> str | None:
    pair = ("rollout_log_probs", "policy_version")
    given = [name for name in pair if name in node.reads]
    if given and node.model != "actor":
        return f"reads '{given[0]}', which is of the actor, not of the {node.model}"
    return "reads 'policy_version' without 'rollout_log_probs'" if given == ["policy_version"] else None


def _names(required: str, optional: str = "") -> dict[str, bool]:
    return dict.fromkeys(required.split(), True) | dict.fromkeys(optional.split(), False)


_OPS: dict[str, OpSpec] = {
    spec.name: spec
    for spec in (
        OpSpec(
            "data",
            writes=_names("sample_id group_id slot prompt_ids row", "response_ids"),
            layout="groups",
            fixed_layout=True,
            rows="source",
            params=("supervised",),
            check=_check_data,
        ),
        OpSpec(
            "rollout",
            reads=_names("prompt_ids"),
            writes=_names("response_ids", "rollout_log_probs finish_reason policy_version"),
            models=("actor",),
            layout="groups",
            fixed_layout=True,
            rows="expand",
            implicit=ROW_IDS,
        ),
        OpSpec(
            "reward",
            reads=_names("prompt_ids response_ids row"),
            writes=_names("reward failed"),
            layout="groups",
        ),
        OpSpec(
            "advantage",
            open_reads=True,
            writes=_names("advantages", "returns"),
            layout="groups",
            whole_groups=True,
            pure=True,
        ),
        OpSpec(
            "filter",
            open_reads=True,
            layout="groups",
            whole_groups=True,
            rows="drop",
            params=("name",),
            check=_check_filter,
        ),
        OpSpec(
            "dynamic_sampling",
            open_reads=True,
            layout="groups",
            fixed_layout=True,
            whole_groups=True,
            rows="drop",
            repeats=True,
            implicit=ROW_IDS,
            params=("name",),
            check=_check_filter,
        ),
        OpSpec(
            "log_prob",
            reads=_names("prompt_ids response_ids", "rollout_log_probs policy_version"),
            writes=_names("log_probs"),
            models=("actor", "reference"),
            layout="tokens",
            pure=True,
            implicit=("slot",),
            check=_check_log_prob,
        ),
        OpSpec(
            "value",
            reads=_names("prompt_ids response_ids"),
            writes=_names("values"),
            models=("critic",),
            layout="tokens",
            pure=True,
            implicit=("slot",),
        ),
        OpSpec(
            "kl_reward",
            reads=_names("reward failed response_ids old_log_probs ref_log_probs"),
            writes=_names("token_rewards"),
            layout="tokens",
        ),
        OpSpec(
            "update",
            reads=_names("prompt_ids response_ids"),
            open_reads=True,
            models=("actor", "critic"),
            layout="tokens",
            trains=True,
            implicit=("sample_id", "slot"),
            params=("loss",),
            check=_check_update,
        ),
        OpSpec("sync_weights", models=("actor",)),
        OpSpec("evaluate", models=("actor",)),
        OpSpec(
            "record_samples",
            reads=_names("prompt_ids response_ids row"),
            open_reads=True,
            implicit=("sample_id", "slot"),
            observes=True,
        ),
    )
}


def register_op(
    name: str,
    *,
    reads: Iterable[str] = (),
    writes: Iterable[str] = (),
    models: Iterable[str] = (),
    layout: Literal["groups", "tokens"] = "groups",
    params: Iterable[str] | None = None,
    observes: bool = False,
    pure: bool = False,
) -> Callable[[Function], Function]:
    """Decorate a function to make it the op ``name``.

    A name in `reads` that ends in ``?`` is optional. The op takes and gives exactly the columns named here, keeps the
    rows as they are, and needs one of `models` unless there are none. `params`: the keys it accepts; None: any. An op
    that `observes` writes nothing and leaves models as they are: rows may move to other workers while it runs. One that
    is `pure` does nothing but write its columns: where no node reads one of them, the planner leaves it out.

    A package offers ops through the entry-point group ``siirl.ops``: the entry's name is the op's, its value the module
    whose import registers it.
    """
    if name in _OPS or name.startswith("python:"):
        raise RequestError(f"op '{name}' cannot be registered: the name is taken")
    if observes and writes:
        raise RequestError(f"op '{name}' cannot be registered: it observes, and writes {', '.join(writes)}")

    if pure and not writes:
        raise RequestError(f"op '{name}' cannot be registered: it is pure, and writes nothing")

    def decorate(function: Function) -> Function:
        _OPS[name] = OpSpec(
            name,
            reads={item.removesuffix("?"): not item.endswith("?") for item in reads},
            writes=dict.fromkeys(writes, True),
            models=tuple(models),
            layout=layout,
            params=None if params is None else tuple(params),
            observes=observes,
            pure=pure,
            function=function,
        )
        return function

    return decorate


def op_names() -> list[str]:
    """Every op that `find_op` knows by name."""
    return sorted({*_OPS, *(entry.name for entry in entry_points(group=ENTRY_POINTS))})


def find_op(name: str) -> OpSpec:
    """The spec of an op.

    Raises:
        RequestError: nothing by this name; the message is a clause that a caller puts a place before.
    """
    if name.startswith("python:"):
        python_target(name)
        return OpSpec(
            name, open_reads=True, open_writes=True, models=MODELS, model_optional=True, layout="groups", params=None
        )
    if name not in _OPS:
        for entry in entry_points(group=ENTRY_POINTS, name=name):
            entry.load()
    if name not in _OPS:
        raise RequestError(f"unknown op '{name}'{did_you_mean(name, op_names())}")
    return _OPS[name]


def python_target(op: str) -> tuple[str, str]:
    """Split ``python:TARGET:FUNCTION`` into a module name or file and the function's name."""
    target, _, function = op.removeprefix("python:").rpartition(":")
    module = target.endswith(".py") or all(part.isidentifier() for part in target.split("."))
    if not op.startswith("python:") or not target or not module or not function.isidentifier():
        raise RequestError(f"op '{op}' is not of the form python:MODULE:FUNCTION or python:FILE.py:FUNCTION")
    return target, function
