"""Which sequences run, which tokens each computes next, and where in the cache they go.

All state is in arrays over the rows of :class:`Sequences`; a token costs no Python per sequence. A row is *waiting*,
*running* or ended. A running row has keys and values of its first ``cached`` tokens; the others it computes next, all
at once or in chunks. Responses to one prompt start together: one computes it, the others *follow* and take its blocks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

import numpy as np

from siirl.rollout.blocks import BLOCK, BlockPool, Ints, prefix_keys
from siirl.rollout.contract import UNFINISHED
from siirl.rollout.sequences import Sequences


@dataclass(frozen=True)
class Work:
    """What one forward pass computes: of each row its tokens ``first`` … ``first + counts - 1``.

    Attributes:
        rows: int64 [B].
        first: int64 [B], tokens in the cache before.
        counts: int64 [B], at least 1.
    """

    rows: Ints
    first: Ints
    counts: Ints

    @property
    def last(self) -> Ints:
        """Where each row's last new token is among all new ones, int64 [B]."""
        return self.counts.cumsum() - 1


class Scheduler:
    """Plans forward passes.

    Args:
        sequences: of the call.
        pool: blocks of the cache.
        max_rows: rows that run at once.
        chunk_tokens: prompt tokens of one pass, so that a long prompt does not hold up the rows that draw.
        version: of the weights, by which prefixes are found.
        copy: copies the content of blocks to others (from, to), int64 [n] each.
    """

    def __init__(
        self,
        sequences: Sequences,
        pool: BlockPool,
        max_rows: int,
        chunk_tokens: int,
        version: int,
        copy: Callable[[Ints, Ints], None],
    ) -> None:
        count, longest = sequences.tokens.shape
        self.running = np.empty(0, np.int64)  # in the order of their admission
        self.cached = np.zeros(count, np.int64)
        self.tables = np.zeros((count, -(-longest // BLOCK)), np.int32)
        self._held = np.zeros(count, np.int64)  # blocks of each row
        self._sequences, self._pool, self._copy = sequences, pool, copy
        self._max_rows, self._chunk, self._version = max_rows, chunk_tokens, version
        self._waiting = deque(np.flatnonzero(sequences.finish == UNFINISHED).tolist())
        self._followers: dict[int, list[int]] = {}
        self._prompt_keys: dict[int, list[bytes]] = {}

    @property
    def unfinished(self) -> bool:
        return bool(len(self.running) or self._waiting)

    @property
    def drawing(self) -> Ints:
        """Running rows whose last known token alone is not computed yet."""
        return self.running[self._sequences.lengths[self.running] - self.cached[self.running] == 1]

    def next(self, guesses: Ints | None = None) -> Work:
        """Admit what fits and plan a pass; ``guesses``: int64 [rows], tokens guessed behind the known ones of each."""
        self._admit()
        while True:
            rows = self.running
            counts = self._counts(rows, guesses)
            rows, counts = rows[counts > 0], counts[counts > 0]
            first = self.cached[rows]
            missing = np.maximum(-(-(first + counts) // BLOCK) - self._held[rows], 0)
            total = int(missing.sum())
            if total <= self._pool.available:
                break
            self._preempt()
        if total:
            self._give(rows, missing, self._pool.take(total))
        return Work(rows, first, counts)

    def computed(self, work: Work) -> tuple[Ints, Ints]:
        """Note that a pass is done.

        Returns:
            The rows that may draw, int64 [D], and for each its place among the rows of ``work``: followers share their
            leader's.
        """
        reached = work.first + work.counts
        self.cached[work.rows] = reached
        ready = np.flatnonzero(reached >= self._sequences.lengths[work.rows])
        for row in work.rows[ready[work.counts[ready] > 1]].tolist():
            self._register(row)  # a group that does not fit at once finds its prompt
        if not self._followers:
            return work.rows[ready], ready
        rows, places = [], []
        for place in ready.tolist():
            leader = int(work.rows[place])
            with_it = [leader, *self._fork(leader, self._followers.pop(leader, []))]
            rows += with_it
            places += [place] * len(with_it)
        return np.array(rows, np.int64), np.array(places, np.int64)

    def settle(self, rows: Ints) -> None:
        """Forget keys and values behind the known tokens: guesses that were wrong. The newest known has none yet."""
        self.cached[rows] = np.minimum(self.cached[rows], self._sequences.lengths[rows] - 1)

    def leave_ended(self, others: bool) -> None:
        """Take out running rows that have ended, and with ``others`` those that follow or wait too."""
        ended = self._sequences.finish[self.running] != UNFINISHED
        for row in self.running[ended].tolist():
            self._release(row)
            self._waiting.extendleft(reversed(self._followers.pop(row, [])))
        self.running = self.running[~ended]
        if others:
            finish = self._sequences.finish
            self._waiting = deque(row for row in self._waiting if finish[row] == UNFINISHED)
            alike = self._followers.items()
            self._followers = {a: [row for row in rows if finish[row] == UNFINISHED] for a, rows in alike}

    def stop(self) -> None:
        """Give all blocks back, whoever still runs."""
        for row in self.running.tolist():
            self._release(row)
        self.running = self.running[:0]

    def _counts(self, rows: Ints, guesses: Ints | None) -> Ints:
        """New tokens of each row: one where it draws, as much as the pass still holds where it does not yet."""
        pending = self._sequences.lengths[rows] - self.cached[rows]
        long = pending > 1
        if long.any():
            before = np.where(long, pending, 0).cumsum() - pending
            pending = np.where(long, np.clip(self._chunk - before, 0, pending), pending)
        if guesses is not None:
            pending = pending + np.where(long, 0, guesses[rows])
        return pending

    def _admit(self) -> None:
        new: list[int] = []
        room = self._max_rows - len(self.running) - sum(map(len, self._followers.values()))
        available = self._pool.available
        while self._waiting and room > 0:
            row = self._waiting[0]
            group = self._startable(row)[:room]
            # one token at least is left to compute: the next is drawn behind it
            found = self._pool.find(self._keys(row, (int(self._sequences.lengths[row]) - 1) // BLOCK))
            # a block more for each row, for its first tokens
            needed = -(-int(self._sequences.lengths[row]) // BLOCK) - len(found) + len(group)
            needed += self._pool.idle(found)
            if needed > available and (len(self.running) or new):
                break
            available -= needed
            room -= len(group)
            for _ in group:
                self._waiting.popleft()
            self._hold(row, np.array(found, np.int64))
            if len(group) > 1:
                self._followers[row] = group[1:]
            new.append(row)
        if new:
            self.running = np.concatenate((self.running, np.array(new, np.int64)))

    def _startable(self, row: int) -> list[int]:
        """The row at the head of the queue, and those behind it that start with the same prompt and nothing more."""
        group = [row]
        if self._sequences.lengths[row] == self._sequences.prompts[row]:
            number = row // self._sequences.group
            lengths = self._sequences.lengths
            for other in islice(self._waiting, 1, self._sequences.group):
                if other // self._sequences.group != number or lengths[other] > lengths[row]:
                    break
                group.append(other)
        return group

    def _fork(self, leader: int, followers: list[int]) -> list[int]:
        """Let followers go on from the leader's cache; those for whom there is no block wait again."""
        length = int(self.cached[leader])
        full, part = length // BLOCK, int(length % BLOCK > 0)
        started = followers[: self._pool.available] if part else followers
        self._waiting.extendleft(reversed(followers[len(started) :]))
        for row in started:
            self._hold(row, self.tables[leader, :full].astype(np.int64))
            self.cached[row] = length
        if part and started:
            own = self._pool.take(len(started))
            self.tables[started, full] = own
            self._held[started] += 1
            self._copy(self.tables[leader, full].astype(np.int64).repeat(len(started)), own)
        self.running = np.concatenate((self.running, np.array(started, np.int64)))
        return started

    def _hold(self, row: int, blocks: Ints) -> None:
        self._pool.share(blocks)
        self.tables[row, : len(blocks)] = blocks
        self._held[row] = len(blocks)
        self.cached[row] = len(blocks) * BLOCK

    def _give(self, rows: Ints, missing: Ints, blocks: Ints) -> None:
        taking = rows.repeat(missing)
        within = np.arange(len(taking)) - (missing.cumsum() - missing).repeat(missing)
        self.tables[taking, self._held[taking] + within] = blocks
        self._held[rows] += missing

    def _preempt(self) -> None:
        """Send the row admitted last back to the queue; what it has computed can be found until its room is needed."""
        row = int(self.running[-1])
        self._release(row)
        self.running = self.running[:-1]
        self._waiting.extendleft(reversed([row, *self._followers.pop(row, [])]))

    def _release(self, row: int) -> None:
        self._register(row)
        self._pool.release(self.tables[row, : self._held[row]].astype(np.int64))
        self._held[row] = self.cached[row] = 0

    def _register(self, row: int) -> None:
        """Let the full blocks of a row be found."""
        full = int(self.cached[row]) // BLOCK
        self._pool.register(self.tables[row, :full].astype(np.int64), self._keys(row, full))

    def _keys(self, row: int, blocks: int) -> list[bytes]:
        """Keys of a row's first ``blocks`` full blocks; a prompt's are worked out once for its group."""
        tokens, number = self._sequences.tokens[row], row // self._sequences.group
        if number not in self._prompt_keys:
            self._prompt_keys[number] = prefix_keys(tokens[: self._sequences.prompts[row]], self._version)
        known = self._prompt_keys[number][:blocks]
        return prefix_keys(tokens[: blocks * BLOCK], self._version, known)
