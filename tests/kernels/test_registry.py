"""The table of kernels: what may be registered, and what is bound."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from siirl_kernels import bind, implementation, kernels, registry, resolved


@pytest.fixture(autouse=True)
def _restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(registry, "_ops", {name: dict(providers) for name, providers in registry._ops.items()})
    yield
    monkeypatch.undo()
    bind([])


def doubled(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return 2 * gate * up


def test_everything_is_bound_to_the_reference_at_first() -> None:
    assert set(resolved().values()) == {"torch"}


def test_the_first_provider_in_order_that_has_the_op_is_bound() -> None:
    implementation("swiglu", "fast")(doubled)
    chosen = bind(["absent", "fast", "torch"])
    assert chosen["swiglu"] == "fast"
    assert chosen["rope"] == "torch"
    assert kernels.swiglu is doubled


def test_a_pin_overrules_the_order() -> None:
    implementation("swiglu", "fast")(doubled)
    assert bind(["fast"], {"swiglu": "torch"})["swiglu"] == "torch"


def test_an_unknown_op_cannot_be_implemented() -> None:
    with pytest.raises(ValueError, match="'swish' is unknown; the ops are .*swiglu"):
        implementation("swish", "fast")(doubled)


def test_a_differing_signature_is_refused() -> None:
    with pytest.raises(ValueError, match=r"implements rope\(gate, up\), the op is rope\(x_TND, cos_TD, sin_TD\)"):
        implementation("rope", "fast")(doubled)


@pytest.mark.parametrize("pinned", [{"swiglu": "absent"}, {"swish": "torch"}])
def test_a_pin_on_nothing_is_refused(pinned: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="no provider"):
        bind([], pinned)
