"""Draws the next tokens of sequences: what may be drawn where, and by which logits.

Shapes: D draws, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from siirl.rollout.blocks import Ints
from siirl.rollout.sampling import Sampling, draw
from siirl.rollout.sequences import Sequences
from siirl_kernels import kernels


@dataclass(frozen=True)
class Drawn:
    """On the host: tokens int64 [D], log-probs float32 [D], ends bool [D]: the token ends its response; the likeliest
    tokens and their log-probs, [D, k] each, where they are wanted."""

    tokens: Ints
    log_probs: NDArray[np.float32]
    ends: NDArray[np.bool_]
    top: tuple[Ints, NDArray[np.float32]] | None


class Sampler:
    """One `Sampling`, for sequences of one call.

    Args:
        ends: the model's end tokens.
        device: of the logits.
    """

    def __init__(self, sampling: Sampling, ends: list[int], sequences: Sequences, device: torch.device) -> None:
        self._sampling, self._sequences, self._device = sampling, sequences, device
        self._never = self._ids(
            [*(ends if sampling.ignore_eos else ()), *(w[0] for w in sampling.bad_words if not w[1:])]
        )
        self._ends = sorted({*(() if sampling.ignore_eos else ends), *sampling.stop_ids})
        self._not_yet = self._ids(self._ends)
        self._phrases = [word for word in sampling.bad_words if word[1:]]

    def __call__(self, logits_DV: Tensor, rows: Ints, places: Ints) -> Drawn:
        """Draw.

        Args:
            logits_DV: of the model; changed on the way and left as they were.
            rows: int64 [D], the sequence of each draw; one may draw several tokens behind each other, of which the
                later ones count where its guesses are right.
            places: int64 [D], where in its response each token would be.
        """
        uniform_D = torch.from_numpy(self._sequences.uniforms[rows, places])
        kept = logits_DV[:, self._never]
        logits_DV.index_fill_(1, self._never, -torch.inf)
        tokens_D, log_probs_D = draw(logits_DV, self._sampling, uniform_D, self._allowed(logits_DV, rows, places))
        if len(self._never):  # log-probs are of the whole distribution
            logits_DV[:, self._never] = kept
            log_probs_D = kernels.token_log_prob(logits_DV, tokens_D, self._sampling.temperature)
        tokens = tokens_D.cpu().numpy()
        return Drawn(tokens, log_probs_D.cpu().numpy(), np.isin(tokens, self._ends), self._top(logits_DV))

    def _ids(self, ids: list[int]) -> Tensor:
        return torch.tensor(ids, dtype=torch.int64, device=self._device)

    def _allowed(self, logits_DV: Tensor, rows: Ints, places: Ints) -> Tensor | None:
        """The logits to draw by, where some draws have others than the model's; what is never drawn is -inf already."""
        early = np.flatnonzero(places < self._sampling.min_new_tokens) if self._ends else places[:0]
        banned = [self._behind(rows, places, word) for word in self._phrases]
        if not (len(early) or self._sampling.penalises or any(map(len, banned))):
            return None
        allowed = (
            self._penalised(logits_DV.float(), rows, places) if self._sampling.penalises else logits_DV.float().clone()
        )
        if len(early):
            allowed[torch.from_numpy(early).to(self._device)[:, None], self._not_yet] = -torch.inf
        for word, at in zip(self._phrases, banned, strict=True):
            allowed[torch.from_numpy(at).to(self._device), word[-1]] = -torch.inf
        return allowed

    def _behind(self, rows: Ints, places: Ints, word: tuple[int, ...]) -> Ints:
        """The draws before which the response ends with all of ``word`` but its last token."""
        at = self._sequences.prompts[rows] + places
        fits = places >= len(word) - 1
        for back, token in enumerate(reversed(word[:-1]), start=1):
            fits &= self._sequences.tokens[rows, np.maximum(at - back, 0)] == token
        return np.flatnonzero(fits)

    def _penalised(self, logits_DV: Tensor, rows: Ints, places: Ints) -> Tensor:
        at = self._sequences.prompts[rows] + places
        ids = self._sequences.tokens[rows, : int(at.max())]
        column, start = np.arange(ids.shape[1])[None, :], self._sequences.prompts[rows][:, None]
        anywhere = self._counts(ids, column < at[:, None], logits_DV)
        drawn = self._counts(ids, (column < at[:, None]) & (column >= start), logits_DV)
        penalty = self._sampling.repetition_penalty
        repeated = torch.where(logits_DV > 0, logits_DV / penalty, logits_DV * penalty)
        logits_DV = torch.where(anywhere > 0, repeated, logits_DV)
        return (
            logits_DV - self._sampling.presence_penalty * (drawn > 0).float() - self._sampling.frequency_penalty * drawn
        )

    def _counts(self, ids: Ints, there: NDArray[np.bool_], like_DV: Tensor) -> Tensor:
        weights = torch.from_numpy(there).to(self._device, torch.float32)
        return torch.zeros_like(like_DV).scatter_add_(1, torch.from_numpy(ids).to(self._device), weights)

    def _top(self, logits_DV: Tensor) -> tuple[Ints, NDArray[np.float32]] | None:
        if not self._sampling.top_log_probs:
            return None
        log_p = torch.log_softmax(logits_DV.float() / (self._sampling.temperature or 1.0), dim=-1)
        values, ids = log_p.topk(self._sampling.top_log_probs, dim=-1)
        return ids.cpu().numpy(), values.cpu().numpy()
