"""Kernel ops: one contract per op, a PyTorch reference each, other implementations by provider.

``kernels`` is the table that model code calls: ``kernels.rms_norm(x, weight, eps)``. Every slot holds the
reference until :func:`bind` chooses, once at start-up, an implementation per op in the back end's order.
"""

from siirl_kernels import algorithms as _algorithms
from siirl_kernels import experts as _experts
from siirl_kernels import reference as _reference
from siirl_kernels import updates as _updates
from siirl_kernels.registry import (
    bind,
    implementation,
    kernels,
    obstacle,
    op,
    provider,
    providers,
    resolved,
    supported,
    table_hash,
)

__all__ = [
    "bind",
    "implementation",
    "kernels",
    "obstacle",
    "op",
    "provider",
    "providers",
    "resolved",
    "supported",
    "table_hash",
]
