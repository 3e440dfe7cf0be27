"""Adapters between training, generation and checkpoints: what travels, what the receiver makes of it, what is saved."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, SupportsInt

import torch
from torch import Tensor

from siirl.config.schema import LoRAConfig
from siirl.errors import RequestError
from siirl.model.decoder import Decoder
from siirl.model.fallback import AnyDecoder
from siirl.model.lora import adapter_shapes, merged_parts, scale_of
from siirl.rollout.checksum import Checksum, confirm, weights_checksum
from siirl.training.fsdp import TrainingEngine

Named = Iterator[tuple[str, Tensor]]
Like = list[tuple[str, Tensor]]


class Merger:
    """The receiver's side, which holds what is adapted: adapters come, merged weights go to the rollout engine.

    Without adapters weights come as they go.

    Args:
        decoder: of the rollout engine, without adapters.
        lora: of the run.
        device, dtype: of what travels.
    """

    def __init__(self, decoder: AnyDecoder, lora: LoRAConfig, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype, self._scale = device, dtype, scale_of(lora)
        self._base = [(name, tuple(p.shape)) for name, p in decoder.named_parameters()]
        self._adapters = adapter_shapes(decoder.config, lora) if isinstance(decoder, Decoder) else []

    def room(self) -> tuple[Like, Like]:
        """Tensors like those that every message has, and like those that only some have."""
        base, adapters = (
            [(name, torch.empty(shape, device=self._device, dtype=self._dtype)) for name, shape in part]
            for part in (self._base, self._adapters)
        )
        return (adapters, base) if adapters else (base, [])

    def merged(
        self, named: Iterable[tuple[str, Tensor]], version: int, checksum: SupportsInt
    ) -> tuple[Named, Checksum]:
        """The weights that an engine computes with, and what sums them up as they pass.

        Args:
            named: all weights, without and with adapters, by name.
            version, checksum: of these.

        Raises:
            SiirlError: some are missing, or are not those that were sent.
        """
        parts = dict(named)
        confirm(version, checksum, parts.items(), parts, [name for name, _ in (*self._base, *self._adapters)])
        passing = Checksum(self._dtype)
        return passing.pairs(merged_parts(parts, self._scale)), passing


def sent_parts(actor: TrainingEngine, lora: LoRAConfig, base: bool) -> tuple[Named, Named | None]:
    """What training sends: the weights of every message, and those that stay with the receiver.

    Args:
        actor: of this worker.
        lora: of the run.
        base: the weights that adapters adapt go too.
    """
    if not lora.rank:
        return actor.named_weights(), None
    return actor.parts(adapters=True), actor.parts(adapters=False) if base else None


def adapters_state(engines: Mapping[str, TrainingEngine], lora: LoRAConfig) -> dict[str, Any] | None:
    """What a checkpoint says of its adapters; None for a run without. A collective where models are sharded.

    Args:
        engines: those whose weights beside the adapters are in their model's files and not in the checkpoint.
        lora: of the run.
    """
    if not lora.rank:
        return None
    sums = {name: weights_checksum(engine.parts(adapters=False)) for name, engine in engines.items()}
    return {"lora": lora.model_dump(mode="json"), "base": sums}


def check_adapters_state(saved: Mapping[str, Any] | None, now: Mapping[str, Any] | None) -> None:
    """Refuse a checkpoint whose adapters are others than the run's, or adapt other weights than the files hold now."""
    before, here = (state["lora"] if state else {"rank": 0} for state in (saved, now))
    for key in sorted(before.keys() | here.keys(), key=lambda key: key != "rank"):
        if before.get(key) != here.get(key):
            raise RequestError(
                f"the checkpoint is of a run with model.lora.{key}={before.get(key)}, and this one has {here.get(key)}"
            )
    for name, checksum in (saved or {}).get("base", {}).items():
        if now is not None and now["base"].get(name) != checksum:
            raise RequestError(
                f"the checkpoint holds adapters of the {name}, and its model's files hold other weights than those "
                "that they were trained beside"
            )
