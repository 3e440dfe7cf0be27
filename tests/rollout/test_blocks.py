"""Blocks of the cache: none is given twice, none is lost, and a prefix is found by its tokens and its weights alone."""

from __future__ import annotations

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from siirl.rollout.blocks import BLOCK, BlockPool, prefix_keys

COUNT = 12


class Pool(RuleBasedStateMachine):
    """Sequences that come and go, against a plain list of what each holds and what each block has."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(COUNT)
        self.held: list[np.ndarray] = []
        self.content: dict[int, bytes] = {}

    @precondition(lambda self: self.pool.available)
    @rule(data=st.data())
    def begin(self, data) -> None:
        tokens = np.array(data.draw(st.lists(st.integers(0, 1), max_size=3)), np.int64).repeat(BLOCK)
        keys = prefix_keys(tokens, version=1)
        found = self.pool.find(keys)
        assert [self.content[block] for block in found] == keys[: len(found)]
        new = len(keys) - len(found)
        if new + self.pool.idle(found) > self.pool.available:
            return
        self.pool.share(found)
        taken = self.pool.take(new)
        blocks = np.concatenate((np.array(found, np.int64), taken))
        self.content |= dict(zip(taken.tolist(), keys[len(found) :], strict=True))
        self.pool.register(blocks, keys)
        self.held.append(blocks)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def end(self, data) -> None:
        self.pool.release(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))

    @invariant()
    def every_block_is_held_or_available(self) -> None:
        distinct = {int(block) for blocks in self.held for block in blocks}
        assert self.pool.available == COUNT - len(distinct)


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_a_key_says_all_tokens_before_and_the_version() -> None:
    tokens = np.arange(3 * BLOCK + 5)
    keys = prefix_keys(tokens, version=4)
    assert len(keys) == 3 and prefix_keys(tokens, 4, known=keys[:1]) == keys
    other = tokens.copy()
    other[0] += 1
    assert not set(prefix_keys(other, 4)) & set(keys)
    assert not set(prefix_keys(tokens, 5)) & set(keys)
    assert prefix_keys(tokens[: 2 * BLOCK], 4) == keys[:2]


def test_the_end_of_what_was_left_longest_ago_goes_first() -> None:
    pool = BlockPool(4)
    first, second = prefix_keys(np.zeros(2 * BLOCK, np.int64), 0), prefix_keys(np.ones(2 * BLOCK, np.int64), 0)
    for keys in (first, second):
        blocks = pool.take(2)
        pool.register(blocks, keys)
        pool.release(blocks)
    pool.take(1)
    assert len(pool.find(first)) == 1 and len(pool.find(second)) == 2
