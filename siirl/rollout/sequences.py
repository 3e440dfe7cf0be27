"""The sequences of one call to an engine, on the host: tokens, log-probs, how far each has come."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from siirl.data.batch import Ragged
from siirl.rollout.blocks import Ints
from siirl.rollout.contract import ABORTED, LENGTH, STOP, UNFINISHED, Begun, Completions
from siirl.rollout.sampling import Sampling, uniforms

Bools = NDArray[np.bool_]


class Sequences:
    """Prompts followed by what has been drawn, one row per response; prompt p has rows p·group … p·group+group-1.

    Attributes:
        tokens: int64 [rows, longest], with room for guesses behind the known ones.
        prompts: int64 [rows], tokens of the prompt.
        lengths: int64 [rows], tokens known.
        finish: int8 [rows]: why a row has ended, or ``UNFINISHED``.
        uniforms: float32 [rows, max_new_tokens], the number that each token is drawn by.
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        sample_ids: torch.Tensor,
        sampling: Sampling,
        group: int,
        seed: int,
        begun: Sequence[Begun | None] = (),
    ) -> None:
        count, new = len(prompts) * group, sampling.max_new_tokens
        longest = max((len(p) for p in prompts), default=0)
        self.group, self._new = group, new
        self.tokens = np.zeros((count, longest + new + sampling.draft_tokens), np.int64)
        for number, prompt in enumerate(prompts):
            self.tokens[number * group : (number + 1) * group, : len(prompt)] = prompt
        self.prompts = np.array([len(p) for p in prompts], np.int64).repeat(group)
        self.lengths = self.prompts.copy()
        self.finish = np.full(count, UNFINISHED, np.int8)
        self.uniforms = uniforms(seed, sample_ids, new).numpy()
        self._log_probs = np.zeros((count, new), np.float32)
        self._versions = np.zeros((count, new), np.int64)
        self._top_ids = np.zeros((count, new, sampling.top_log_probs), np.int64)
        self._top_log_probs = np.zeros((count, new, sampling.top_log_probs), np.float32)
        for row, start in enumerate(begun):
            if start is not None:
                self._go_on(row, start)

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def drawn(self) -> Ints:
        """Tokens drawn, int64 [rows]."""
        return self.lengths - self.prompts

    def left(self, rows: Ints) -> Ints:
        """Tokens that ``rows`` may still draw."""
        return self._new - (self.lengths[rows] - self.prompts[rows])

    def append(
        self,
        rows: Ints,
        tokens: Ints,
        log_probs: NDArray[np.float32],
        top: tuple[Ints, NDArray[np.float32]] | None,
        version: int,
    ) -> None:
        """A token for each of ``rows``, no two alike."""
        at = self.lengths[rows]
        place = at - self.prompts[rows]
        self.tokens[rows, at] = tokens
        self._log_probs[rows, place] = log_probs
        self._versions[rows, place] = version
        if top is not None:
            self._top_ids[rows, place], self._top_log_probs[rows, place] = top
        self.lengths[rows] = at + 1

    def end(self, rows: Ints, stopped: Bools) -> None:
        """End those of ``rows`` that are full or for which ``stopped`` says so."""
        self.finish[rows[self.left(rows) <= 0]] = LENGTH
        self.finish[rows[stopped]] = STOP

    def abort(self, which: Bools) -> None:
        """End rows as they are."""
        self.finish[which & (self.finish == UNFINISHED)] = ABORTED

    def whole_groups(self) -> int:
        """Prompts whose responses have all ended."""
        return int((self.finish != UNFINISHED).reshape(-1, self.group).all(1).sum())

    def response(self, row: int) -> list[int]:
        """Tokens drawn for a row."""
        return self.tokens[row, self.prompts[row] : self.lengths[row]].tolist()

    def completions(self, version: int) -> Completions:
        drawn = self.drawn
        filled = np.arange(self._new)[None, :] < drawn[:, None]
        offsets = torch.cat((torch.zeros(1, dtype=torch.int64), torch.from_numpy(drawn).cumsum(0)))
        rows = np.arange(len(self)).repeat(drawn)
        columns = (self.prompts[:, None] + np.arange(self._new)[None, :])[filled]

        def ragged(values: NDArray) -> Ragged:
            return Ragged(torch.from_numpy(np.ascontiguousarray(values)), offsets)

        wanted = self._top_ids.shape[2] > 0
        return Completions(
            ragged(self.tokens[rows, columns]),
            ragged(self._log_probs[filled]),
            torch.from_numpy(self.finish),
            version,
            ragged(self._versions[filled]),
            torch.from_numpy(self._top_ids[filled]) if wanted else None,
            torch.from_numpy(self._top_log_probs[filled]) if wanted else None,
        )

    def _go_on(self, row: int, start: Begun) -> None:
        count = len(start.response_ids)
        first = int(self.prompts[row])
        self.tokens[row, first : first + count] = start.response_ids
        self._log_probs[row, :count], self._versions[row, :count] = start.log_probs, start.versions
        self.lengths[row], self.finish[row] = first + count, start.finish_reason
