"""The table of kernels: what may be registered, and what is bound."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from siirl_kernels import bind, implementation, kernels, providers, registry, supported, table_hash


@pytest.fixture(autouse=True)
def _restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(registry, "_ops", {name: dict(functions) for name, functions in registry._ops.items()})
    monkeypatch.setattr(registry, "_predicates", dict(registry._predicates))
    yield
    monkeypatch.undo()
    bind([])


def doubled(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return 2 * gate * up


def test_everything_is_bound_to_the_reference_at_first() -> None:
    program = "import siirl_kernels; print(*set(siirl_kernels.resolved().values()))"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "torch\n"


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


def only_even(gate: torch.Tensor, up: torch.Tensor) -> bool:
    return gate.shape[-1] % 2 == 0


def test_the_reference_runs_where_a_predicate_says_no() -> None:
    implementation("swiglu", "fast", supports=only_even)(doubled)
    bind(["fast"])
    even, odd = torch.full((1, 2), 3.0), torch.full((1, 3), 3.0)
    assert torch.equal(kernels.swiglu(even, up=even), 2 * even * even)
    assert torch.equal(kernels.swiglu(odd, odd), torch.nn.functional.silu(odd) * odd)
    assert supported("swiglu", "fast", {"gate": even, "up": even})
    assert not supported("swiglu", "fast", {"gate": odd, "up": odd})
    assert providers("swiglu")["fast"] is doubled


def test_a_refused_call_goes_to_the_next_in_the_order() -> None:
    def tripled(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return 3 * gate * up

    implementation("swiglu", "even", supports=only_even)(doubled)
    implementation("swiglu", "small", supports=lambda gate, up: gate.numel() < 9)(tripled)
    chosen = bind(["even", "small", "torch"])
    assert chosen["swiglu"] == "even > small" and chosen["rope"] == "torch"
    ones = [torch.ones(1, n) for n in (2, 3, 9)]
    assert [float(kernels.swiglu(x, up=x).sum()) for x in ones[:2]] == [4.0, 9.0]
    assert torch.equal(kernels.swiglu(ones[2], ones[2]), providers("swiglu")["torch"](ones[2], ones[2]))
    implementation("swiglu", "small")(tripled)  # takes every call, so nobody is asked behind it
    assert bind(["small", "even"])["swiglu"] == "small" and kernels.swiglu is tripled
    assert bind(["torch", "even"])["swiglu"] == "torch"
    assert bind(["small"], {"swiglu": "even"})["swiglu"] == "even"  # behind a pinned one there is the reference alone


def test_a_predicate_has_the_signature_of_the_op() -> None:
    with pytest.raises(ValueError, match=r"implements swiglu\(x\), the op is swiglu\(gate, up\)"):
        implementation("swiglu", "fast", supports=lambda x: True)(doubled)


def test_an_implementation_registered_again_loses_its_predicate() -> None:
    implementation("swiglu", "fast", supports=only_even)(doubled)
    implementation("swiglu", "fast")(doubled)
    assert supported("swiglu", "fast", {"gate": torch.ones(1, 3), "up": torch.ones(1, 3)})


def test_the_hash_of_the_table_follows_what_is_bound() -> None:
    bind([])
    before = table_hash()
    implementation("swiglu", "fast")(doubled)
    assert table_hash() == before
    bind(["fast"])
    assert table_hash() != before
    bind([])
    assert table_hash() == before
