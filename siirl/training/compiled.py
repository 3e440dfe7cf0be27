"""``training.compile``: what a decoder's layers compute around attention, through torch.compile.

A graph each for a norm, for the projections with their norms and rotation, and for the MLP; the same for all layers and
for any number of tokens. Attention stays as it is bound: it depends on where sequences begin, which would be another
graph for every micro-batch. Ops in a graph are traced as their references, whatever is bound: other implementations
would end it, and a compiler that sees the arithmetic fuses it by itself.
"""

from __future__ import annotations

import torch
from torch import nn

from siirl.errors import RequestError
from siirl.model.decoder import MLP, Block
from siirl_kernels import kernels
from siirl_kernels.registry import providers

_TRACED = ("rms_norm", "rope", "swiglu", "linear")
_replaced: set[int] = set()


def compile_layers(module: nn.Module) -> None:
    """Compile the layers of a decoder, in place; passes with and without gradients are compiled when they run first.

    Raises:
        RequestError: `transformers` runs the model.
    """
    blocks = [part for part in module.modules() if isinstance(part, Block)]
    if not blocks:
        raise RequestError(
            "training.compile is true, but transformers runs this model, and only siirl's own decoder is compiled; "
            "set training.compile=false"
        )
    _trace_references()
    for block in blocks:
        attention = block.self_attn
        attention.project = torch.compile(attention.project, dynamic=True)  # type: ignore[method-assign]
        for part in (block.input_layernorm, block.post_attention_layernorm, block.mlp):
            if isinstance(part, MLP) or part is not block.mlp:
                part.compile(dynamic=True)


def _trace_references() -> None:
    for name in _TRACED:
        bound, reference = getattr(kernels, name), providers(name)["torch"]
        if bound is not reference and id(bound) not in _replaced:
            torch.compiler.substitute_in_graph(bound)(reference)
            _replaced.add(id(bound))
