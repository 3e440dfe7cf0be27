"""LoRA (Hu et al. 2021, arXiv 2106.09685): frozen weights W, and trained matrices A and B of low rank beside them.

y = W x + s · B (A x) with s = alpha / rank, or alpha / √rank (rsLoRA, Kalajdzievski 2023, arXiv 2312.03732). B begins
at zero, so an adapted model begins as the one it adapts. Shapes: T tokens, H inputs, O outputs, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from siirl.config.schema import LoRAConfig
from siirl.errors import RequestError
from siirl.model.config import DecoderConfig
from siirl.model.decoder import Decoder, Linear
from siirl.model.experts import local
from siirl.model.fallback import AnyDecoder
from siirl_kernels import kernels

_ADAPTER = (".lora_A", ".lora_B")


class LoRALinear(Linear):
    """A linear layer with an adapter; it holds the given layer's own weight and bias.

    Attributes:
        lora_A: [R, H], uniform within 1/√H as in the reference implementation (github.com/microsoft/LoRA).
        lora_B: [O, R], zero.
        active: whether the adapter takes part.
    """

    def __init__(self, layer: nn.Linear, rank: int, scale: float) -> None:
        nn.Module.__init__(self)  # the parent's would make another weight
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias
        self.lora_A = nn.Parameter(layer.weight.new_empty(rank, layer.in_features))
        self.lora_B = nn.Parameter(layer.weight.new_zeros(layer.out_features, rank))
        self.scale, self.active = scale, True

    def forward(self, x_TH: Tensor) -> Tensor:
        y_TO = super().forward(x_TH)
        if not self.active:
            return y_TO
        low_TR = kernels.linear(x_TH, local(self.lora_A).to(x_TH.dtype), None)
        return y_TO + self.scale * kernels.linear(low_TR, local(self.lora_B).to(x_TH.dtype), None)


def scale_of(config: LoRAConfig) -> float:
    """s, by which B A is multiplied; 0 where the rank is."""
    if not config.rank:
        return 0.0
    return config.alpha / (math.sqrt(config.rank) if config.rslora else config.rank)


def adapt(decoder: AnyDecoder, config: LoRAConfig, seed: int) -> None:
    """Put an adapter beside each of ``config.targets`` in every layer of a decoder on the host.

    Raises:
        RequestError: `transformers` runs the model.
    """
    if not isinstance(decoder, Decoder):
        raise RequestError(
            f"model.lora.rank is {config.rank}, but transformers runs a model of type '{decoder.config.family}', and "
            "only siirl's own decoder takes adapters; set model.lora.rank=0"
        )
    generator = torch.Generator().manual_seed(seed)
    for path, layer in list(decoder.named_modules()):
        parent, _, name = path.rpartition(".")
        if name in config.targets and isinstance(layer, nn.Linear):
            made = LoRALinear(layer, config.rank, scale_of(config))
            bound = 1 / math.sqrt(layer.in_features)
            with torch.no_grad():
                made.lora_A.uniform_(-bound, bound, generator=generator)
            setattr(decoder.get_submodule(parent), name, made)


def adapted(module: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """The layers with adapters, by their names in ``module``."""
    return ((name, layer) for name, layer in module.named_modules() if isinstance(layer, LoRALinear))


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name is a matrix of an adapter."""
    return name.endswith(_ADAPTER)


def base_names(module: nn.Module) -> list[str]:
    """Names of the parameters but those of adapters: those of the checkpoint."""
    return [name for name, _ in module.named_parameters() if not is_adapter(name)]


@torch.no_grad()
def begin_adapters(module: nn.Module, trained: bool, adapters: bool) -> None:
    """Begin a stage: what adapters learned so far becomes part of the weights they adapt, and B is zero again.

    Args:
        module: sharded or not; changed in place. A collective where it is sharded.
        trained: whether the stage trains the module.
        adapters: adapters alone are trained, beside parameters that no checkpoint has (the critic's head); else all
            but the adapters, which then take no part.
    """
    layers = [layer for _, layer in adapted(module)]
    for layer in layers:
        layer.weight.add_(layer.lora_B @ layer.lora_A, alpha=layer.scale)
        layer.lora_B.zero_()
        layer.active = adapters
    for name, parameter in module.named_parameters():
        of_adapter = is_adapter(name) or name == "value_head.weight"
        wanted = of_adapter if adapters and layers else not is_adapter(name)
        parameter.requires_grad_(trained and wanted)


@contextmanager
def without_adapters(module: nn.Module) -> Iterator[None]:
    """Compute with the weights that adapters adapt."""
    layers = [layer for _, layer in adapted(module) if layer.active]
    for layer in layers:
        layer.active = False
    try:
        yield
    finally:
        for layer in layers:
            layer.active = True


def merge(weight_OH: Tensor, a_RH: Tensor, b_OR: Tensor, scale: float) -> Tensor:
    """W + s · B A in the weight's dtype, computed in float32."""
    merged = torch.addmm(weight_OH.float(), b_OR.float(), a_RH.float(), alpha=scale)
    return merged.to(weight_OH.dtype)


def merged_weights(
    module: nn.Module, whole: Callable[[Tensor], Tensor], dtype: torch.dtype | None = None
) -> Iterator[tuple[str, Tensor]]:
    """A module's weights under the names of its checkpoint, adapters merged; its own tensors where there is none.

    Args:
        module: sharded or not.
        whole: makes a tensor whole where it is sharded.
        dtype: that W, A and B are rounded to first, as where they travel in it; None: not rounded.
    """
    layers = {f"{name}.weight": layer for name, layer in adapted(module) if layer.active}
    for name, parameter in module.named_parameters():
        if is_adapter(name):
            continue
        if name not in layers:
            yield name, whole(parameter)
            continue
        layer = layers[name]
        parts = [whole(part).to(dtype) for part in (parameter, layer.lora_A, layer.lora_B)]
        yield name, merge(parts[0], parts[1], parts[2], layer.scale)


def merged_parts(parts: Mapping[str, Tensor], scale: float) -> Iterator[tuple[str, Tensor]]:
    """As :func:`merged_weights`, of a module's parameters by name: where only these are."""
    for name, tensor in parts.items():
        layer = name.removesuffix(".weight")
        if is_adapter(name):
            continue
        if f"{layer}.lora_A" in parts:
            yield name, merge(tensor, parts[f"{layer}.lora_A"], parts[f"{layer}.lora_B"], scale)
        else:
            yield name, tensor


def adapter_shapes(config: DecoderConfig, lora: LoRAConfig) -> list[tuple[str, tuple[int, int]]]:
    """Names and shapes of the adapters that :func:`adapt` makes, in their order; none where the rank is 0."""
    if not lora.rank:
        return []
    with torch.device("meta"):
        decoder = Decoder(config)
    found = []
    for name, layer in decoder.named_modules():
        if name.rpartition(".")[2] in lora.targets and isinstance(layer, nn.Linear):
            found += [
                (f"{name}.lora_A", (lora.rank, layer.in_features)),
                (f"{name}.lora_B", (layer.out_features, lora.rank)),
            ]
    return found
