"""What the vLLM adapter does with vLLM's model, inside vLLM's worker.

vLLM keeps weights in layouts of its own: fused, sharded over tensor-parallel workers, packed for the device's kernels.
Its own loader makes them from tensors named and shaped as in a checkpoint, so that is how they are given.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from siirl.errors import RequestError


class Temperature:
    """Divides the logits as they leave the model, so that vLLM's log-probs are those of softmax(logits / temperature).

    vLLM offers log-probs either of the plain logits or after every filter; training computes neither.
    """

    def __init__(self) -> None:
        self._value = 1.0

    def set(self, temperature: float) -> None:
        """0 is greedy, with log-probs at temperature 1."""
        self._value = temperature or 1.0

    def attach(self, model: nn.Module) -> None:
        from vllm.model_executor.layers.logits_processor import LogitsProcessor

        for module in model.modules():
            if isinstance(module, LogitsProcessor):
                module.register_forward_hook(self._divide)

    def _divide(self, module: nn.Module, inputs: Any, logits: Tensor | None) -> Tensor | None:
        if logits is None or self._value == 1.0:
            return logits
        return logits.float() / self._value


def load_weights(worker: Any, named: Iterable[tuple[str, Tensor]]) -> None:
    """Replace the weights of vLLM's model in place.

    Args:
        worker: vLLM's.
        named: whole tensors under the names of a checkpoint, read once.
    """
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    with set_current_vllm_config(worker.vllm_config), torch.no_grad():
        worker.model_runner.reload_weights(weights_iterator=named)
        for module in worker.model_runner.get_model().modules():
            # A head tied to the embedding is not in the checkpoint, and its packed copy would stay as it was.
            if isinstance(module, ParallelLMHead):
                module.quant_method.process_weights_after_loading(module)


class Cache:
    """The KV cache's memory, given back and taken again where vLLM has no sleep mode: its tensors stay, empty."""

    def __init__(self) -> None:
        self._freed: list[tuple[torch.UntypedStorage, int]] = []

    def free(self, worker: Any) -> None:
        storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in _tensors(worker)}
        self._freed = [(storage, storage.nbytes()) for storage in storages.values()]
        for storage, _ in self._freed:
            storage.resize_(0)

    def restore(self, worker: Any) -> None:
        for storage, size in self._freed:
            storage.resize_(size)
        for tensor in _tensors(worker):
            tensor.zero_()  # as vLLM makes it: a block that is read in part must hold numbers
        self._freed = []


def _tensors(worker: Any) -> list[Tensor]:
    return list(worker.model_runner.kv_caches)


def require_head_size(model: nn.Module) -> None:
    """Refuse a model whose attention the device's kernels cannot compute; vLLM would fail at the first prompt."""
    from vllm.model_executor.layers.attention import Attention

    for module in model.modules():
        if isinstance(module, Attention) and not module.attn_backend.supports_head_size(module.head_size):
            sizes = ", ".join(str(size) for size in module.attn_backend.get_supported_head_sizes())
            raise RequestError(
                f"vLLM's attention on this device takes heads of {sizes} numbers, and this model's have "
                f"{module.head_size}; set rollout.engine=native"
            )


def compile_nothing() -> None:
    """Keep vLLM from compiling its helpers where it computes eagerly: that takes a C++ compiler and 15 seconds."""
    from vllm.platforms import current_platform

    current_platform.simple_compile_backend = "eager"
