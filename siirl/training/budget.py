"""How many tokens a micro-batch has, and what happens when so many do not fit."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch

from siirl.device.backend import Backend
from siirl.device.collectives import Collectives
from siirl.errors import WorkerLost
from siirl.training.containment import Containment, out_of_memory
from siirl.training.microbatch import MicroBatch, dummy

log = logging.getLogger(__name__)

_FITTED, _ONE_ROW = torch.iinfo(torch.int64).max, 0


class TokenBudget:
    """Tokens of one micro-batch of a model, the same on every worker.

    Where a worker runs out of memory all of them agree on half of that micro-batch's tokens and make the passes again.
    The smaller number stays for the rest of the stage.

    Args:
        backend, collectives: of this worker.
        containment: of a model whose passes are collectives; None where a worker may leave a pass by itself.
    """

    tokens: int

    def __init__(self, backend: Backend, collectives: Collectives, containment: Containment | None) -> None:
        self._backend, self._collectives, self._containment = backend, collectives, containment

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
                if self._containment is None:
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
            if self._containment is not None or not out_of_memory(error):
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
        if self._collectives.rank == 0:
            log.warning(
                "a micro-batch of %d tokens does not fit in memory: from here on they have up to %d tokens, not %d",
                least,
                self.tokens,
                before,
            )
        return False
