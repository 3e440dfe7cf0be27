"""A micro-batch that does not fit costs its passes and nothing else: halves are tried, and the update is the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from siirl.device.collectives import Collectives
from siirl.errors import WorkerLost
from siirl.model.critic import ValueModel
from siirl.telemetry.accumulator import StepMetrics
from siirl.training.losses import LOSSES
from siirl_kernels import kernels
from tests.training.batches import batch, config, decoder
from tests.training.test_updates import engine, update, weights
from tests.training.workers import together

ROWS = [[0, 1, 2, 3, 6, 7], [4, 5, 8, 9, 10, 11]]
BUDGET, ROOM = 100, 30
"""Tokens of a micro-batch as configured, and how many fit. The longest row has 20, each worker several of them."""

HOST = (
    "[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."
)


class _Allocate(torch.autograd.Function):
    """Where a tensor of that many tokens is asked for, forward or backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, allocate: Callable[[str, int], None]) -> Tensor:
        allocate("forward", len(x))
        ctx.allocate = allocate
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.allocate("backward", len(grad))
        return grad, None


def small_device(when: str, message: str | None = None) -> Callable[[str, int], None]:
    """An allocator of a device on which ROOM tokens fit, that is asked in the direction ``when``."""

    def allocate(direction: str, tokens: int) -> None:
        if direction == when and tokens > ROOM:
            raise torch.OutOfMemoryError("out of memory") if message is None else RuntimeError(message)

    return allocate


def the_kth(when: str, k: int) -> Callable[[str, int], None]:
    """An allocator that fails once, at the k-th request."""
    asked = {"forward": 0, "backward": 0}

    def allocate(direction: str, tokens: int) -> None:
        asked[direction] += 1
        if direction == when and asked[when] == k:
            raise torch.OutOfMemoryError("out of memory")

    return allocate


def on(model: nn.Module, allocate: Callable[[str, int], None]) -> nn.Module:
    """The model, with an allocation in each layer's MLP and attention."""
    for layer in getattr(model, "decoder", model).model.layers:
        for part in (layer.mlp.up_proj, layer.self_attn.v_proj):
            part.register_forward_hook(lambda _, __, out: _Allocate.apply(out, allocate))
    return model


def settings(**training: object) -> Any:
    return config(**{"training__micro_batch_tokens": BUDGET} | {f"training__{k}": v for k, v in training.items()})


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


@pytest.mark.parametrize("message", [None, HOST], ids=["device", "host"])
@pytest.mark.parametrize("when", ["forward", "backward"])
@pytest.mark.parametrize("loss", ["policy", "value"])
def test_the_update_is_the_undisturbed_one_with_the_budget_that_fits(
    loss: str, when: str, message: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    def model() -> nn.Module:
        return ValueModel(decoder()) if loss == "value" else decoder()

    disturbed, metrics = update(settings(), batch(), loss, steps=3, model=on(model(), small_device(when, message)))
    tokens = disturbed.budget.tokens
    assert ROOM / 2 < tokens <= 60
    plain, expected = update(settings(micro_batch_tokens=tokens), batch(), loss, steps=3, model=model())
    assert same(weights(disturbed), weights(plain))
    assert metrics == expected  # of the attempts that failed nothing is counted
    lines = [record.getMessage() for record in caplog.records if "does not fit" in record.getMessage()]
    assert 1 <= len(lines) <= 2  # one for each halving, and none for the two steps that follow
    assert f"from here on they have up to {tokens} tokens, not " in lines[-1]


@pytest.mark.parametrize("when", ["forward", "backward"])
@pytest.mark.parametrize("k", [1, 2, 3, 6, 9])
def test_wherever_memory_runs_out_no_gradient_counts_twice(when: str, k: int) -> None:
    whole = settings(micro_batch_tokens=30)
    disturbed, metrics = update(whole, batch(), model=on(decoder(), the_kth(when, k)))
    assert disturbed.budget.tokens < 30
    plain, expected = update(whole, batch())
    assert metrics == pytest.approx(expected, rel=1e-4, abs=1e-6)
    for name, tensor in weights(plain).items():
        torch.testing.assert_close(weights(disturbed)[name], tensor, atol=1e-6, rtol=1e-5)


def test_log_probs_that_do_not_fit_are_those_of_smaller_micro_batches() -> None:
    trained = engine(settings(), model=on(decoder(), small_device("forward")))
    found = trained.log_probs(batch(), 1).values
    assert trained.budget.tokens < BUDGET
    assert torch.equal(found, engine(settings(micro_batch_tokens=trained.budget.tokens)).log_probs(batch(), 1).values)


def test_a_row_that_does_not_fit_ends_the_run_with_the_allocators_words() -> None:
    def never(direction: str, tokens: int) -> None:
        raise torch.OutOfMemoryError("tried to allocate 3 GiB")

    with pytest.raises(torch.OutOfMemoryError, match="tried to allocate 3 GiB"):
        update(settings(), batch(), model=on(decoder(), never))


def test_another_runtime_error_is_no_lack_of_memory() -> None:
    def broken(direction: str, tokens: int) -> None:
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        update(settings(), batch(), model=on(decoder(), broken))


CASES = [
    (sharding, when, where, mode)
    for sharding in ("replicate", "shard")
    for when in ("forward", "backward")
    for where, mode in (("layer", "none"), ("layer", "full"), ("head", "none"))
    if sharding == "shard" or (where, mode) == ("layer", "none")
]


def _one_of_two_runs_out(collectives: Collectives) -> dict[str, Any]:
    """Worker 1 alone is short of memory; what each case leaves on this worker."""
    found: dict[str, Any] = {}
    for sharding, when, where, mode in CASES:
        allocate = small_device(when) if collectives.rank else small_device("never")
        chosen = settings(sharding=sharding, recompute=mode)
        own_head = kernels.linear_log_prob
        if where == "head":
            kernels.linear_log_prob = lambda h, *rest: own_head(_Allocate.apply(h, allocate), *rest)  # noqa: B023
        model = decoder() if where == "head" else on(decoder(), allocate)
        trained, metrics = update(
            chosen, batch().take(ROWS[collectives.rank]), steps=2, collectives=collectives, model=model
        )
        kernels.linear_log_prob = own_head
        found[f"{sharding} {when} {where} {mode}"] = (trained.budget.tokens, weights(trained), metrics)
    return found


def _a_row_too_long(collectives: Collectives) -> dict[str, str]:
    """Nothing fits on worker 1."""

    def never(direction: str, tokens: int) -> None:
        if collectives.rank:
            raise torch.OutOfMemoryError("tried to allocate 3 GiB")

    said, loss, samples = {}, LOSSES["policy"](settings().algorithm), batch().take(ROWS[collectives.rank])
    for sharding in ("replicate", "shard"):
        trained = engine(settings(sharding=sharding), collectives, on(decoder(), never))
        try:
            trained.update(samples, loss, 1, StepMetrics())
        except (torch.OutOfMemoryError, WorkerLost) as error:
            said[sharding] = f"{type(error).__name__}: {error}"
    return said


def _both(collectives: Collectives) -> tuple[dict[str, Any], dict[str, str]]:
    return _one_of_two_runs_out(collectives), _a_row_too_long(collectives)


@pytest.mark.slow
def test_workers_agree_when_one_of_them_runs_out_and_end_together_where_a_row_does_not_fit(tmp_path: Path) -> None:
    plain, expected = update(settings(), batch(), steps=2)
    lost = "WorkerLost: a row of another worker does not fit in its memory"
    words = [lost, "OutOfMemoryError: tried to allocate 3 GiB"]
    for rank, (found, said) in enumerate(together(_both, 2, tmp_path)):
        assert said == dict.fromkeys(("replicate", "shard"), words[rank])
        for case, (tokens, own, metrics) in found.items():
            assert tokens < BUDGET, f"{case} on worker {rank}"
            assert metrics == pytest.approx(expected, rel=1e-4, abs=1e-6), case
            for name, tensor in weights(plain).items():
                torch.testing.assert_close(own[name], tensor, atol=1e-5, rtol=1e-5, msg=f"{case}: {name}")
