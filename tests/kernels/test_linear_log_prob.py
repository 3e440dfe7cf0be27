"""Fused linear, log-prob and entropy: the values and gradients of the plain formula, in any number of chunks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import siirl_kernels.linear_log_prob as fused
from siirl_kernels import bind, kernels, providers
from tests.device_under_test import device

assert device()  # whose back end brings implementations of its own

TOKENS, HIDDEN, VOCABULARY = 11, 6, 23


@pytest.fixture(params=[1, 4 * VOCABULARY, 16 * 2**20], ids=["token by token", "uneven chunks", "one chunk"])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "_CHUNK_ELEMENTS", request.param)


@pytest.fixture(params=[name for name in providers("linear_log_prob") if name != "ascend"], autouse=True)
def _bound(request: pytest.FixtureRequest) -> Iterator[None]:
    bind([], {"linear_log_prob": request.param})
    yield
    bind([])


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator).requires_grad_()
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator).requires_grad_()
    return hidden, weight, torch.randint(VOCABULARY, (TOKENS,), generator=generator)


def plain(hidden: Tensor, weight: Tensor, target: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    p = torch.distributions.Categorical(logits=hidden.double() @ weight.double().t() / temperature)
    return p.log_prob(target), p.entropy()


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.5])
@pytest.mark.parametrize("used", ["log_prob", "entropy", "both"])
def test_values_and_gradients(temperature: float, used: str) -> None:
    hidden, weight, target = inputs()
    scale = torch.linspace(-2, 3, TOKENS)
    gradients = []
    for function in (kernels.linear_log_prob, plain):
        log_prob, entropy = function(hidden, weight, target, temperature)
        first, second = (scale * log_prob).sum(), (scale.flip(0) * entropy).sum()
        loss = {"log_prob": first, "entropy": second, "both": first + second}[used]
        gradients.append((log_prob, entropy, *torch.autograd.grad(loss, (hidden, weight))))
    for ours, formula in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, formula.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("chunks")
def test_results_are_float32_whatever_the_inputs() -> None:
    hidden, weight, target = inputs()
    log_prob, entropy = kernels.linear_log_prob(hidden.bfloat16(), weight.bfloat16(), target, 1.0)
    assert log_prob.dtype == entropy.dtype == torch.float32


def test_tokens_times_vocabulary_is_never_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "_CHUNK_ELEMENTS", 2 * VOCABULARY)
    hidden, weight, target = inputs()
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        kernels.linear_log_prob(hidden, weight, target, 1.0)
    assert max(kept) < TOKENS * VOCABULARY


def test_bfloat16_weight_gradient_does_not_lose_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sum of a thousand chunks in bfloat16 would be off by several percent; one rounding is 0.4 %."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4096, 32, generator=generator).bfloat16()
    weight = (0.3 * torch.randn(64, 32, generator=generator)).bfloat16().requires_grad_()
    target = torch.randint(64, (4096,), generator=generator)
    plain(hidden, weight, target, 1.0)[0].sum().backward()
    expected, weight.grad = weight.grad, None
    monkeypatch.setattr(fused, "_CHUNK_ELEMENTS", 4 * 64)
    kernels.linear_log_prob(hidden, weight, target, 1.0)[0].sum().backward()
    assert expected is not None
    assert weight.grad is not None
    assert (weight.grad - expected).float().norm() < 0.01 * expected.float().norm()
