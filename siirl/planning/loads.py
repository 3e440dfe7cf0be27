"""What each share of the workers has to compute, from the rows it got: arrays over shares."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from siirl.planning.workload import Floats, Ints, Rows


@dataclass(frozen=True)
class Training:
    """Sums over the rows of a mini-batch on each share, float64 [shares].

    Attributes:
        rows: samples.
        groups: prompts with at least one sample here.
        tokens: response tokens.
        squares: squares of response lengths, summed.
    """

    rows: Floats
    groups: Floats
    tokens: Floats
    squares: Floats


@dataclass(frozen=True)
class Loads:
    """A step's work.

    Attributes:
        generated: response lengths of each generating share, int64 [sources, n], 0 where a share has fewer.
        prompts: prompts of each generating share, float64 [sources].
        training: one entry a mini-batch.
        prompt: tokens of a prompt.
        leaving, arriving: tokens of the rows that leave each training share, or come to it; float64 [targets].
    """

    generated: Ints
    prompts: Floats
    training: tuple[Training, ...]
    prompt: float
    leaving: Floats
    arriving: Floats

    @classmethod
    def of(cls, rows: Rows) -> Loads:
        sources, targets = int(rows.home.max()) + 1, int(rows.target.max()) + 1
        strata = int(rows.stratum.max()) + 1
        per_share = np.bincount(rows.home, minlength=sources)
        generated = np.zeros((sources, per_share.max()), np.int64)
        place = np.arange(len(rows.home)) - (per_share.cumsum() - per_share)[rows.home]
        generated[rows.home, place] = rows.responses
        first = np.flatnonzero(np.diff(rows.group, prepend=-1))
        prompts = np.bincount(rows.home[first], minlength=sources).astype(float)
        cell = rows.stratum * targets + rows.target
        pairs = np.unique(rows.group * targets + rows.target)
        group_stratum = np.zeros(int(rows.group.max()) + 1, np.int64)
        group_stratum[rows.group] = rows.stratum
        cells = strata * targets
        table = np.stack(
            [
                np.bincount(cell, minlength=cells).astype(float),
                np.bincount(group_stratum[pairs // targets] * targets + pairs % targets, minlength=cells).astype(float),
                np.bincount(cell, rows.responses, cells),
                np.bincount(cell, rows.responses.astype(float) ** 2, cells),
            ]
        ).reshape(4, strata, targets)
        training = tuple(Training(*table[:, m]) for m in range(strata))
        near, tokens = rows.near, rows.responses + rows.prompt
        moving = near != rows.target
        leaving = np.bincount(near[moving], tokens[moving], targets).astype(float)
        arriving = np.bincount(rows.target[moving], tokens[moving], targets).astype(float)
        return cls(generated, prompts, training, rows.prompt, leaving, arriving)
