"""How many tokens a micro-batch has, and what happens when so many do not fit."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from siirl.config.schema import Config
from siirl.device.backend import Backend
from siirl.device.collectives import Collectives
from siirl.errors import WorkerLost
from siirl.model.config import DecoderConfig
from siirl.model.decoder import Decoder
from siirl.planning.budget import Held, auto_tokens
from siirl.planning.shape import ModelShape
from siirl.training.containment import Containment, out_of_memory
from siirl.training.microbatch import MicroBatch, dummy

if TYPE_CHECKING:
    from siirl.training.fsdp import TrainingEngine

log = logging.getLogger(__name__)

_FITTED, _ONE_ROW = torch.iinfo(torch.int64).max, 0


class TokenBudget:
    """Tokens of one micro-batch of a model, the same on every worker.

    Where a worker runs out of memory all of them agree on half of that micro-batch's tokens and make the passes again.
    The smaller number stays for the rest of the stage.

    Args:
        backend, collectives: of this worker.
        lockstep: passes are collectives, which a worker must not leave.
        containment: of a model whose passes are; without it a lack of memory ends such a pass, and the run.
    """

    tokens: int

    def begin(self, config: Config) -> None:
        """Begin a stage with the configured number; for `auto`, :func:`share_memory` follows."""
        tokens = config.training.micro_batch_tokens
        self.tokens = config.data.max_prompt_tokens + config.rollout.max_new_tokens if tokens == "auto" else tokens

    def __init__(
        self, backend: Backend, collectives: Collectives, lockstep: bool, containment: Containment | None = None
    ) -> None:
        self._backend, self._collectives = backend, collectives
        self._lockstep, self._containment = lockstep, containment
        self.rank, self.workers = collectives.rank, collectives.size

    def agree_on(self, tokens: int) -> None:
        """The least of what the workers found fitting. A collective."""
        self.tokens = int(self._collectives.all_reduce(torch.tensor(tokens), "min"))

    def fit(self, micros: Sequence[MicroBatch], work: Callable[[int, MicroBatch], None]) -> bool:
        """Call ``work(i, micro)`` for each micro-batch. A collective.

        Returns:
            False where some worker had no memory: what was computed is in vain, and :attr:`tokens` are fewer.

        Raises:
            torch.OutOfMemoryError: a single row does not fit here.
            WorkerLost: it does not fit on another worker.
        """
        failed, said = None, ""
        for i, micro in enumerate(micros):
            if failed is not None:
                if not self._lockstep:
                    break
                micro = dummy(self._backend.device())
            problem = self._attempt(work, i, micro)
            if problem is not None and failed is None:
                failed, said = micro, problem
        return self._agree(failed, said)

    def check(self) -> None:
        """Raise torch.OutOfMemoryError where a pass made by itself ran out of memory."""
        said = None if self._containment is None else self._containment.take()
        if said is not None:
            raise torch.OutOfMemoryError(said)

    def _attempt(self, work: Callable[[int, MicroBatch], None], i: int, micro: MicroBatch) -> str | None:
        """What the allocator said, None where there was memory."""
        said = None
        try:
            work(i, micro)
        except RuntimeError as error:
            if self._lockstep or not out_of_memory(error):
                raise
            said = str(error)
        if self._containment is not None:
            said = self._containment.take()
        if said is not None:
            self._backend.empty_cache()
        return said

    def _agree(self, failed: MicroBatch | None, said: str) -> bool:
        tokens = _FITTED
        if failed is not None:
            tokens = _ONE_ROW if len(failed.rows) <= 1 else len(failed.tokens_T)
        least = int(self._collectives.all_reduce(torch.tensor(tokens), "min"))
        if least == _FITTED:
            return True
        if least == _ONE_ROW:
            if tokens == _ONE_ROW:
                raise torch.OutOfMemoryError(said)
            raise WorkerLost("a row of another worker does not fit in its memory")
        before, self.tokens = self.tokens, max(1, least // 2)
        if self.rank == 0:
            log.warning(
                "a micro-batch of %d tokens does not fit in memory: from here on they have up to %d tokens, not %d",
                least,
                self.tokens,
                before,
            )
        return False


def share_memory(engines: Mapping[str, TrainingEngine], config: Config, backend: Backend) -> None:
    """With `training.micro_batch_tokens: auto`, give every engine of a stage as many tokens as fit. A collective.

    On a host whose workers share the memory each has a core's part of it, so that their number changes nothing.
    """
    training, actor = config.training, engines["actor"]
    if training.micro_batch_tokens != "auto":
        return
    decoder = actor.model
    if not isinstance(decoder, Decoder):
        if actor.budget.rank == 0:
            log.warning("transformers runs this model, whose memory is not known: micro-batches of one sample")
        return
    memory = backend.memory()
    total = memory.total / (backend.capabilities().compute_units if memory.unified else 1)
    held = [_held(engine) for engine in engines.values()]
    longest = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    shards = actor.spread.averaged
    tokens = auto_tokens(shape_of(decoder.config), held, training, total, shards, longest, unified=memory.unified)
    for engine in engines.values():
        engine.budget.agree_on(tokens)
    if actor.budget.rank == 0:
        log.info("training.micro_batch_tokens is auto: %d", actor.budget.tokens)


def _held(engine: TrainingEngine) -> Held:
    counts = [(parameter.numel(), parameter.requires_grad) for parameter in engine.model.parameters()]
    return Held(sum(count for count, _ in counts), sum(count for count, trained in counts if trained))


def shape_of(config: DecoderConfig) -> ModelShape:
    """A decoder's shape as the cost model knows it."""
    given = vars(config)
    return ModelShape(**{name: given[name] for name in ModelShape.model_fields if name in given})
