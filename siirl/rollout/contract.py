"""What every rollout engine promises: prompts and sampling in; tokens, log-probs, reasons and versions out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, SupportsInt

from torch import Tensor

from siirl.data.batch import Ragged
from siirl.rollout.sampling import Sampling

SleepLevel = Literal[1, 2]
STOP, LENGTH, ABORTED, UNFINISHED = 0, 1, 2, 3


@dataclass(frozen=True)
class Completions:
    """Responses, in the order of the sample ids asked for.

    Attributes:
        response_ids: int64, ragged; ends with the end-of-sequence token where one was drawn.
        log_probs: float32, ragged like the responses.
        finish_reason: int8 [rows], ``STOP``, ``LENGTH``, ``ABORTED`` or ``UNFINISHED``; only a response aborted or
            unfinished may be empty.
        version: of the weights that drew the last tokens.
        versions: int64, ragged like the responses: of the weights that drew each token.
        top_ids: int64 [tokens, k], the likeliest tokens at each place of all responses, where they were asked for.
        top_log_probs: float32 [tokens, k], theirs.
        router_choices: int16, ragged, values [tokens, layers with experts, experts of a token]: of prompt and response
            but its last token, where the engine records them.
    """

    response_ids: Ragged
    log_probs: Ragged
    finish_reason: Tensor
    version: int
    versions: Ragged
    top_ids: Tensor | None = None
    top_log_probs: Tensor | None = None
    router_choices: Ragged | None = None


@dataclass(frozen=True)
class Begun:
    """A response that an earlier call has begun, or ended where its finish reason says so."""

    response_ids: Sequence[int]
    log_probs: Sequence[float]
    versions: Sequence[int]
    finish_reason: int


class RolloutEngine(Protocol):
    """What a rollout engine does."""

    version: int

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sample_ids: Tensor,
        sampling: Sampling,
        group_size: int,
        seed: int,
        begun: Sequence[Begun | None] = (),
        enough: int | None = None,
    ) -> Completions:
        """Draw responses.

        Args:
            prompts: token ids.
            sample_ids: int64 [prompts · group_size]; with the seed they decide what is drawn.
            sampling: how.
            group_size: responses to each prompt.
            seed: of the call.
            begun: responses to go on from, one per sample; where it is None, from the prompt.
            enough: return as soon as so many groups have ended, the others unfinished.
        """
        ...

    def update_weights(
        self, named: Iterable[tuple[str, Tensor]], version: int, checksum: SupportsInt | None = None
    ) -> None:
        """Take over new weights, and confirm them.

        Args:
            named: the weights; none where the engine computes with training's own tensors.
            version: that `Completions.version` gives from now on.
            checksum: of all weights in the engine's dtype (:func:`siirl.rollout.checksum.weights_checksum`), or a
                :class:`siirl.rollout.checksum.Checksum` that sums them up as they come; None: nothing is confirmed.

        Raises:
            SiirlError: weights are missing, or those that the engine holds now have another checksum.
        """
        ...

    def abort(self, sample_ids: Tensor | None = None) -> None:
        """End responses of the call to `generate` in progress, from another thread; None: all of them.

        That call gives them back as they are, at most one token longer. Without such a call nothing happens.
        """
        ...

    def sleep(self, level: SleepLevel = 1) -> None:
        """Give the device's memory back: 1 keeps the engine's own weights on the host, 2 drops them.

        Weights that training computes with too stay where they are, and an engine that sleeps goes on sleeping as it
        does.
        """
        ...

    def wake(self) -> None:
        """Take the memory back. Weights that were dropped have to come through `update_weights` before `generate`."""
        ...
