"""Weights of generation: they stay as they are while an object lives, so that a provider may keep a form of its own.

Shapes: H hidden, O outputs, N query heads, K key/value heads, D head size, I intermediate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class _Weights:
    _forms: dict[str, Any] = field(default_factory=dict, init=False, repr=False)

    def form(self, name: str, make: Callable[[], T]) -> T:
        """What ``make`` returned when this was first asked for under that name."""
        if name not in self._forms:
            self._forms[name] = make()
        return self._forms[name]

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Any:
        """The same weights elsewhere, as ``dtype``, without forms."""
        named = {f.name: getattr(self, f.name) for f in fields(self) if f.init}
        moved = {name: x.to(device, dtype) if isinstance(x, Tensor | _Weights) else x for name, x in named.items()}
        return type(self)(**moved)


@dataclass(frozen=True, eq=False)
class LinearWeights(_Weights):
    """A linear layer.

    Attributes:
        weight: [O, H].
        bias: [O], or None.
        one_result: results are large and only the latest is needed: it may lie where the one before it lay.
    """

    weight: Tensor
    bias: Tensor | None = None
    one_result: bool = False


@dataclass(frozen=True, eq=False)
class LayerWeights(_Weights):
    """A decoder layer of the Llama, Qwen2 or Qwen3 family.

    Attributes:
        input_norm, post_norm: [H], before the attention and after it.
        q, k, v, o: of the attention, outputs N · D, K · D, K · D and H.
        q_norm, k_norm: [D] of each head (Qwen3), or None.
        gate, up, down: of the MLP, outputs I, I and H.
        eps: of the norms.
    """

    input_norm: Tensor
    q: LinearWeights
    k: LinearWeights
    v: LinearWeights
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: LinearWeights
    post_norm: Tensor
    gate: LinearWeights
    up: LinearWeights
    down: LinearWeights
    eps: float
