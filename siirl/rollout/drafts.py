"""Guesses of the next tokens: what followed the last ones where they stood before (prompt lookup, n-gram drafts).

Responses of reinforcement learning repeat their prompts. A guess costs a place in the next forward pass; every token is
still drawn from the model's own distribution, by its own random number, and a guess counts where it is the token drawn
(speculative decoding, arXiv 2211.17192, with a deterministic drafter): a response is the same with guesses and without.
"""

from __future__ import annotations

import numpy as np

from siirl.rollout.blocks import Ints
from siirl.rollout.sequences import Sequences


def guess(sequences: Sequences, rows: Ints, most: int, match: int) -> Ints:
    """Write up to ``most`` guesses behind the known tokens of ``rows``.

    Args:
        sequences: their ``tokens`` have room for the guesses.
        rows: int64 [B].
        match: how many last tokens must have stood together before; the latest such place is taken.

    Returns:
        int64 [rows of ``sequences``], the number of guesses of each row, 0 for those not asked for.
    """
    counts = np.zeros(len(sequences), np.int64)
    if not len(rows):
        return counts
    lengths = sequences.lengths[rows]
    longest = int(lengths.max())
    tokens = sequences.tokens[rows, :longest]
    # alike[b, i]: the `match` tokens before place i are the last known ones
    alike = np.zeros((len(rows), longest), bool)
    if longest > match:
        alike[:, match:] = True
        for back in range(1, match + 1):
            last = tokens[np.arange(len(rows)), np.maximum(lengths - back, 0)]
            alike[:, match:] &= tokens[:, match - back : longest - back] == last[:, None]
    alike &= np.arange(longest)[None, :] < lengths[:, None]
    place = longest - 1 - alike[:, ::-1].argmax(1)
    found = np.flatnonzero(alike.any(1) & (lengths > match))
    left = sequences.left(rows[found]) - 1  # the last token of a response needs no guess behind it
    number = np.clip(np.minimum(lengths[found] - place[found], left), 0, most)
    for ahead in range(int(number.max(initial=0))):
        some = found[number > ahead]
        row = rows[some]
        sequences.tokens[row, lengths[some] + ahead] = tokens[some, place[some] + ahead]
    counts[rows[found]] = number
    return counts
