"""The optimiser and the clipping are PyTorch's in every bit, by the kernel ops."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from siirl.checkpoint.optimizer import optimizer_tensors
from siirl.config.schema import TrainingConfig
from siirl.training.adamw import AdamW
from siirl.training.optimizer import make_optimizer
from siirl_kernels import kernels
from tests import device_under_test
from tests.training.batches import config, decoder
from tests.training.test_updates import engine


def layers() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(33, 65), nn.Tanh(), nn.LayerNorm(65), nn.Linear(65, 7)).to(
        device_under_test.device()
    )


def step(module: nn.Module, optimizer: torch.optim.Optimizer, number: int, unused: int = -1) -> None:
    """A step with gradients drawn for it; the parameter of that number has none."""
    generator = torch.Generator().manual_seed(number)
    for i, p in enumerate(module.parameters()):
        drawn = torch.randn(p.shape, generator=generator).to(p.device)
        p.grad = None if i == unused else drawn
    optimizer.step()


def theirs(module: nn.Module, settings: TrainingConfig) -> torch.optim.AdamW:
    parameters = list(module.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    fused = parameters[0].device.type == "cpu"
    return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=fused)


def bits(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return dict(module.state_dict()) | optimizer_tensors(module, optimizer)


def test_it_steps_as_pytorchs_adamw_does_to_the_bit() -> None:
    settings = TrainingConfig(lr=0.01, weight_decay=0.1)
    ours, other = layers(), layers()
    optimizer, expected = make_optimizer(ours, settings, settings.lr), theirs(other, settings)
    for number in range(1, 5):
        for module, steps in ((ours, optimizer), (other, expected)):
            for group in steps.param_groups:
                group["lr"] = settings.lr / number
            step(module, steps, number, unused=3 if number == 2 else -1)  # whose count is one behind from then on
    found, wanted = bits(ours, optimizer), bits(other, expected)
    assert found.keys() == wanted.keys()
    for name, x in wanted.items():
        assert found[name].dtype == x.dtype and torch.equal(found[name], x), name
    assert {name: int(x) for name, x in found.items() if name.startswith("2.") and name.endswith(".step")} == {
        "2.weight.step": 4,
        "2.bias.step": 3,
    }


def test_a_state_of_pytorchs_goes_on_here() -> None:
    settings = TrainingConfig(lr=0.01)
    other = layers()
    expected = theirs(other, settings)
    for number in (1, 2):
        step(other, expected, number)
    ours = copy.deepcopy(other)
    optimizer = make_optimizer(ours, settings, settings.lr)
    optimizer.load_state_dict(copy.deepcopy(expected.state_dict()))
    for module, steps in ((ours, optimizer), (other, expected)):
        step(module, steps, 3)
    for name, x in bits(other, expected).items():
        assert torch.equal(bits(ours, optimizer)[name], x), name


def test_a_state_goes_through_the_names_of_a_checkpoint() -> None:
    settings = TrainingConfig(lr=0.01)
    first = layers()
    optimizer = make_optimizer(first, settings, settings.lr)
    for number in (1, 2):
        step(first, optimizer, number)
    second = copy.deepcopy(first)
    again = make_optimizer(second, settings, settings.lr)
    for name, x in optimizer_tensors(second, again).items():
        x.copy_(optimizer_tensors(first, optimizer)[name])
    for module, steps in ((first, optimizer), (second, again)):
        step(module, steps, 3)
    assert all(map(torch.equal, first.parameters(), second.parameters()))


def test_the_closure_is_called_with_gradients_on() -> None:
    module = layers()
    optimizer = AdamW(module.parameters(), lr=0.1)

    def closure() -> Tensor:
        loss = module(torch.ones(2, 33, device=device_under_test.device())).sum()
        loss.backward()
        return loss

    before = [p.clone() for p in module.parameters()]
    assert isinstance(optimizer.step(closure), Tensor)
    assert not all(map(torch.equal, before, module.parameters()))


@pytest.mark.parametrize("limit", [0.5, None, 1e9])
def test_gradients_are_clipped_as_by_pytorch_to_the_bit(limit: float | None) -> None:
    made, other = (
        engine(config(training__max_grad_norm=limit), model=decoder()),
        decoder().to(device_under_test.device()),
    )
    for mine, p in zip(made.model.parameters(), other.parameters(), strict=True):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())).to(p.device)
        mine.grad = p.grad.clone()
    norm = made.spread.clip_gradients(limit or math.inf)
    assert norm == float(nn.utils.clip_grad_norm_(other.parameters(), limit or math.inf))
    for mine, p in zip(made.model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine.grad, p.grad)
    square = sum(float(p.grad.double().square().sum()) for p in made.model.parameters())
    assert limit != 0.5 or math.isclose(square**0.5, 0.5, rel_tol=1e-5)


def test_the_norm_of_nothing_is_zero() -> None:
    assert kernels.gradient_norm([]) == 0
