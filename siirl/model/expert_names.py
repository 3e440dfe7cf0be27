"""Experts' weights between a checkpoint, which names each expert apart, and memory, where a layer's are stacked.

Published checkpoints of Qwen3-MoE, and what `transformers` saves, have ``mlp.experts.E.gate_proj.weight`` [J, H],
``up_proj`` [J, H] and ``down_proj`` [H, J] for each expert. The decoder has ``mlp.experts.gate_up_proj`` [E, 2J, H],
gate before up, and ``mlp.experts.down_proj`` [E, H, J].
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from siirl.errors import RequestError
from siirl.model.config import DecoderConfig

_ONE = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight")
_STACKED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


def stack_experts(config: DecoderConfig, tensors: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """The tensors of a checkpoint under the decoder's names; experts leave ``tensors`` as they are copied.

    Raises:
        RequestError: an expert is missing, left over, or of another shape than the others.
    """
    stems = sorted({match[1] for name in tensors if (match := _ONE.fullmatch(name))})
    for stem in stems:
        for stacked, projections in _STACKED.items():
            names = [[f"{stem}.{e}.{p}.weight" for p in projections] for e in range(config.num_experts)]
            missing = [name for row in names for name in row if name not in tensors]
            if missing:
                raise RequestError(f"{where} lacks {len(missing)} weights of experts, the first is {missing[0]}")
            shapes = [tuple(tensors[name].shape) for row in names for name in row]
            if odd := [name for name, shape in zip(sum(names, []), shapes, strict=True) if shape != shapes[0]]:
                raise RequestError(f"{where}: {odd[0]} has another shape than the first expert, {list(shapes[0])}")
            tensors[f"{stem}.{stacked}"] = torch.stack(
                [torch.cat([tensors.pop(name) for name in row]) for row in names]
            )
    return tensors


def split_experts(named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The inverse: weights as a checkpoint names them, stacked ones as views of each expert's."""
    for name, tensor in named:
        names = published_names(name, len(tensor) if tensor.dim() else 0)
        if names == [name]:
            yield name, tensor
            continue
        parts = len(names) // len(tensor)
        pieces = [piece for expert in tensor.unbind(0) for piece in expert.chunk(parts)]
        yield from zip(names, pieces, strict=True)


def published_names(name: str, experts: int) -> list[str]:
    """What a checkpoint calls the parameter ``name`` of a decoder: itself, or its parts, expert by expert."""
    stem, _, last = name.rpartition(".")
    if not stem.endswith(".mlp.experts") or last not in _STACKED:
        return [name]
    return [f"{stem}.{e}.{projection}.weight" for e in range(experts) for projection in _STACKED[last]]
