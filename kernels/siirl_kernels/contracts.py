"""What every implementation of an op promises: over which inputs, to which accuracy, and how repeatably.

The truth of a case is the reference computed in float64 on the host from the very same, already rounded inputs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from siirl_kernels import algorithm_cases, cases, expert_cases, inference_cases, update_cases
from siirl_kernels.accuracy import EXACT, Tolerance, tolerances
from siirl_kernels.cases import Generate, Level, Source
from siirl_kernels.packing import PackedSequences
from siirl_kernels.paging import PagedSequences
from siirl_kernels.registry import supported
from siirl_kernels.weights import LayerWeights, LinearWeights

# The provider all of whose implementations keep a row's bits.
INVARIANT = "invariant"
Direction = Literal["forward", "backward"]
TakeRow = Callable[[dict[str, Any], int], tuple[dict[str, Any], slice] | None]


@dataclass(frozen=True)
class Case:
    """One call of an op.

    Attributes:
        name: unique within the op and level.
        arguments: keyword arguments of the op, tensors on the device.
        size: of the numbers that the op adds up, where they are not of the order of 1: rounding errors are as much
            larger, so the absolute part of the tolerance is.
    """

    name: str
    arguments: dict[str, Any]
    size: float = 1.0

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> Case:
        """The same call elsewhere, floating tensors cast to ``dtype``."""
        return replace(self, arguments={name: _moved(x, device, dtype) for name, x in self.arguments.items()})


@dataclass(frozen=True)
class Contract:
    """The contract of one op.

    Attributes:
        op: its name in the registry.
        differentiable: arguments that gradients reach.
        tolerances: of the forward pass, by the dtype of the inputs.
        backward_scale: factor for the elements of gradients.
        deterministic: the same call gives the same bits, gradients included, in the back end's deterministic mode.
        batch_invariant: of every provider, a row comes out the same, bit for bit, whatever rows are beside it.
        rows: arguments whose first dimension is the rows; empty where the op has no rows to take apart.
        take_row: how rows are taken apart where they are no slices of `rows`: the arguments of one row alone and its
            part of each result, or None behind the last row.
        writes: arguments that the op changes.
        in_place: the op returns nothing, what it writes are its results.
        returns: the dtype of each result; None, and where nothing is said, that of the inputs; or the name of the
            argument that is the dtype.
    """

    op: str
    generate: Generate
    tolerances: Mapping[str, Tolerance]
    differentiable: tuple[str, ...] = ()
    backward_scale: float = 1.0
    deterministic: bool = True
    batch_invariant: bool = False
    rows: tuple[str, ...] = ()
    take_row: TakeRow | None = None
    writes: tuple[str, ...] = ()
    in_place: bool = False
    returns: tuple[torch.dtype | str | None, ...] = (None,)

    def cases(self, level: Level, dtype: torch.dtype, device: torch.device | str, seed: int = 0) -> Iterator[Case]:
        """The calls an implementation is judged by; the same numbers on every device, up to the rounding to ``dtype``.

        ``smoke`` is small and quick, ``full`` covers every shape class, ``perf`` are the
        sizes of real models, smaller on a host.
        """
        source = Source(dtype, torch.device(device), seed)
        for name, arguments, size in self.generate(level, source):
            yield Case(name, arguments, size)

    def invariant(self, provider: str) -> bool:
        """Whether the provider's implementation promises that a row comes out the same whatever rows are beside it."""
        return bool(self.rows or self.take_row) and (self.batch_invariant or provider == INVARIANT)

    def alone(self, case: Case) -> Iterator[tuple[Case, slice]]:
        """The call of each row alone, and where its part of each result of ``case`` is."""
        for row in itertools.count():
            found = self._row(case.arguments, row)
            if found is None:
                return
            yield replace(case, arguments=case.arguments | found[0]), found[1]

    def _row(self, arguments: dict[str, Any], row: int) -> tuple[dict[str, Any], slice] | None:
        if self.take_row is not None:
            return self.take_row(arguments, row)
        if row >= len(arguments[self.rows[0]]):
            return None
        part = slice(row, row + 1)
        return {name: arguments[name][part] for name in self.rows}, part

    def leaves(self, case: Case) -> dict[str, Tensor]:
        """The case's arguments that gradients reach; an optional one may be absent."""
        return {name: case.arguments[name] for name in self.differentiable if case.arguments[name] is not None}

    def dtype(self, number: int, direction: Direction, inputs: torch.dtype, case: Case) -> torch.dtype:
        """The dtype of a result, or of a gradient, for inputs of dtype ``inputs``."""
        if direction == "backward" or self.in_place:
            return inputs
        found = self.returns[number]
        return case.arguments[found] if isinstance(found, str) else found or inputs

    def tolerance(self, dtype: torch.dtype, case: Case, direction: Direction) -> Tolerance:
        """What may be lost in a case."""
        factor = self.backward_scale if direction == "backward" else 1.0
        return self.tolerances[str(dtype).removeprefix("torch.")].times(factor, factor * case.size)


def tensors_of(values: Iterable[Any]) -> list[Tensor]:
    """The tensors among values, those in lists too."""
    found: list[Tensor] = []
    for value in values:
        found += [value] if isinstance(value, Tensor) else tensors_of(value) if isinstance(value, list) else []
    return found


def results(
    function: Callable[..., Any], case: Case, contract: Contract, inference: bool = False
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, and outside inference mode gradients for upstream gradients that every dtype represents.

    What the op writes is a copy of the case's, so that the case can be called again.
    """
    leaves = {} if inference else {name: x.detach().requires_grad_() for name, x in contract.leaves(case).items()}
    written = {name: _copied(case.arguments[name]) for name in contract.writes}
    with torch.inference_mode(inference):
        out = function(**case.arguments | leaves | written)
    if contract.in_place:
        return tensors_of(written.values()), []
    outputs = list(out) if isinstance(out, tuple) else [out]
    if not leaves:
        return outputs, []
    generator = torch.Generator().manual_seed(7)
    upstream = [torch.randn(x.shape, generator=generator).bfloat16().half().to(x.device, x.dtype) for x in outputs]
    pairs = [(x, gradient) for x, gradient in zip(outputs, upstream, strict=True) if x.requires_grad]
    roots, gradients = zip(*pairs, strict=True)
    return outputs, list(torch.autograd.grad(roots, list(leaves.values()), gradients))


def _copied(x: Any) -> Any:
    return [each.clone() for each in x] if isinstance(x, list) else x.clone()


def taken(
    op: str, provider: str, level: Level, dtype: torch.dtype, device: torch.device | str
) -> Iterator[tuple[Case, bool]]:
    """The cases that an implementation says it takes, and whether it does only in inference mode."""
    for case in CONTRACTS[op].cases(level, dtype, device):
        for inference in (False, True):
            with torch.inference_mode(inference):
                accepted = supported(op, provider, case.arguments)
            if accepted:
                yield case, inference
                break


def _moved(x: Any, device: torch.device, dtype: torch.dtype | None) -> Any:
    if isinstance(x, PackedSequences):
        return replace(x, device=device)
    if isinstance(x, PagedSequences):
        return x.to(device)
    if isinstance(x, LinearWeights | LayerWeights):
        return x.to(device, dtype)
    if isinstance(x, Tensor):
        return x.to(device, dtype if x.is_floating_point() else None)
    if isinstance(x, list):
        return [_moved(each, device, dtype) for each in x]
    return x


CONTRACTS: dict[str, Contract] = {
    contract.op: contract
    for contract in (
        Contract(
            op="rms_norm",
            differentiable=("x", "weight"),
            tolerances=tolerances(single=(8, 4), half=(3, 0.5)),
            backward_scale=6,
            rows=("x",),
            generate=cases.rms_norm,
        ),
        Contract(
            op="rope",
            differentiable=("x_TND",),
            tolerances=tolerances(single=(4, 1), half=(3, 0.5)),
            backward_scale=1,
            batch_invariant=True,
            rows=("x_TND", "cos_TD", "sin_TD"),
            generate=cases.rope,
        ),
        Contract(
            op="swiglu",
            differentiable=("gate", "up"),
            tolerances=tolerances(single=(16, 4), half=(3, 0.5)),
            backward_scale=2,
            rows=("gate", "up"),
            generate=cases.swiglu,
        ),
        Contract(
            op="packed_attention",
            differentiable=("q_TND", "k_TKD", "v_TKD"),
            tolerances=tolerances(single=(48, 32), half=(4, 1)),
            backward_scale=4,
            generate=cases.packed_attention,
        ),
        Contract(
            op="linear_log_prob",
            differentiable=("hidden_TH", "weight_VH"),
            tolerances=tolerances(single=(32, 8), half=(4, 2)),
            backward_scale=6,
            rows=("hidden_TH", "target_T"),
            returns=(torch.float32, torch.float32),
            generate=cases.linear_log_prob,
        ),
        Contract(
            op="paged_attention",
            tolerances=tolerances(single=(48, 32), half=(4, 2)),
            writes=("keys_PSKD", "values_PSKD"),
            generate=inference_cases.paged_attention,
        ),
        Contract(
            op="linear",
            differentiable=("x_TH", "weight_OH", "bias"),
            tolerances=tolerances(single=(32, 8), half=(3, 0.5)),
            backward_scale=6,
            rows=("x_TH",),
            generate=inference_cases.linear,
        ),
        Contract(
            op="inference_linear",
            tolerances=tolerances(single=(32, 8), half=(3, 0.5)),
            rows=("x_TH",),
            generate=inference_cases.inference_linear,
        ),
        Contract(
            op="inference_layer",
            # eleven ops behind each other, of which each takes up the rounding of those before
            tolerances=tolerances(single=(256, 64), half=(16, 4)),
            writes=("keys_PSKD", "values_PSKD"),
            generate=inference_cases.inference_layer,
        ),
        Contract(
            op="categorical",
            tolerances=dict.fromkeys(("float32", "float16", "bfloat16"), Tolerance(16 * 2**-24, 16 * 2**-24, 2**-20)),
            rows=("logits_BV", "uniform_B"),
            returns=(torch.int64, torch.float32),
            generate=inference_cases.categorical,
        ),
        Contract(
            op="token_log_prob",
            tolerances=dict.fromkeys(("float32", "float16", "bfloat16"), Tolerance(16 * 2**-24, 16 * 2**-24, 2**-20)),
            rows=("logits_BV", "tokens_B"),
            returns=(torch.float32,),
            generate=inference_cases.token_log_prob,
        ),
        Contract(
            op="permute_tokens",
            differentiable=("x_TH",),
            tolerances=tolerances(single=(4, 1), half=(3, 0.5)),
            backward_scale=2,
            generate=expert_cases.permute_tokens,
        ),
        Contract(
            op="unpermute_tokens",
            differentiable=("x_RH", "weights_TK"),
            tolerances=tolerances(single=(16, 4), half=(3, 0.5)),
            backward_scale=6,
            generate=expert_cases.unpermute_tokens,
        ),
        Contract(
            op="grouped_linear",
            differentiable=("x_RH", "weight_EOH"),
            tolerances=tolerances(single=(32, 8), half=(3, 0.5)),
            backward_scale=6,
            generate=expert_cases.grouped_linear,
        ),
        Contract(
            op="group_advantages",
            # computed in float64, rounded once
            tolerances=tolerances(single=(2, 0.5), half=(2, 0.5)),
            generate=algorithm_cases.group_advantages,
        ),
        Contract(
            op="gae",
            # a response of L tokens is a chain of L roundings
            tolerances=dict.fromkeys(("float32", "float16", "bfloat16"), Tolerance(32 * 2**-24, 32 * 2**-24, 2**-20)),
            batch_invariant=True,
            take_row=algorithm_cases.take_response,
            returns=(torch.float32, torch.float32),
            generate=algorithm_cases.gae,
        ),
        Contract(
            op="policy_loss",
            differentiable=("log_probs_T",),
            tolerances=tolerances(single=(32, 8), half=(3, 0.5)),
            batch_invariant=True,
            rows=("log_probs_T", "old_log_probs_T", "advantages_T"),
            returns=(torch.float32,) * 5,
            generate=algorithm_cases.policy_loss,
        ),
        Contract(
            op="gradient_norm",
            tolerances=dict.fromkeys(("float32", "float16", "bfloat16"), Tolerance(64 * 2**-24, 64 * 2**-24, 1.0)),
            returns=(torch.float32,),
            generate=update_cases.gradient_norm,
        ),
        Contract(
            op="adamw_step",
            tolerances=tolerances(single=(8, 2), half=(3, 0.5)),
            writes=("parameters", "exp_avgs", "exp_avg_sqs"),
            in_place=True,
            generate=update_cases.adamw_step,
        ),
        Contract(
            op="cast_pack",
            tolerances=EXACT,
            returns=("dtype",),
            generate=update_cases.cast_pack,
        ),
    )
}
