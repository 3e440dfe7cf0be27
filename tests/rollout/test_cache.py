"""What the paged cache saves and never changes: shared prompts, kept prefixes, chunks, preemption, guesses."""

from __future__ import annotations

import pytest
import torch

from siirl.rollout.blocks import BLOCK
from siirl.rollout.contract import LENGTH, UNFINISHED, Begun
from siirl.rollout.engine import NativeEngine
from siirl.rollout.sampling import Sampling
from siirl.rollout.scheduler import Scheduler
from siirl.rollout.state import cache_bytes_per_token
from tests.rollout.test_engine import as_lists, engine, tiny

LONG = [[3 + (7 * i + j) % 90 for j in range(n)] for i, n in enumerate((40, 5, 33, 64, 1))]
BLOCK_BYTES = BLOCK * cache_bytes_per_token(tiny().config, torch.float32)


def computed(decoder: torch.nn.Module) -> list[int]:
    """Tokens of each forward pass from now on."""
    seen: list[int] = []
    decoder.model.embed_tokens.register_forward_hook(lambda module, args, out: seen.append(len(args[0])))
    return seen


def run(made: NativeEngine, sampling: Sampling, prompts=LONG, group: int = 3, seed: int = 0, **options):
    return made.generate(prompts, torch.arange(len(prompts) * group), sampling, group, seed, **options)


def assert_alike(done, other) -> None:
    assert as_lists(done) == as_lists(other)
    assert torch.equal(done.finish_reason, other.finish_reason)
    torch.testing.assert_close(done.log_probs.values, other.log_probs.values, atol=3e-5, rtol=0)


SAMPLING = Sampling(30, temperature=1.5)


def test_a_group_holds_its_prompt_once() -> None:
    made = engine(tiny())
    most = 0
    plan = Scheduler.next

    def watched(self: Scheduler, guesses=None):
        nonlocal most
        work = plan(self, guesses)
        most = max(most, len(made._pool) - made._pool.available)
        return work

    Scheduler.next = watched
    try:
        made.generate([LONG[3]], torch.arange(8), Sampling(BLOCK, ignore_eos=True), 8, 0)
    finally:
        Scheduler.next = plan
    assert most == len(LONG[3]) // BLOCK + 8  # four blocks of the prompt, and each response's own


def test_a_prompt_that_comes_again_is_not_computed_again_until_the_weights_change() -> None:
    decoder = tiny()
    made, seen = engine(decoder), computed(decoder)
    run(made, SAMPLING, LONG[:1], 1)
    first = seen[0]
    done = run(made, SAMPLING, LONG[:1], 1)
    assert (first, seen[len(seen) // 2]) == (40, 40 - 2 * BLOCK)
    other = tiny()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.3)
    made.update_weights(other.named_parameters(), 1)
    seen.clear()
    changed = run(made, SAMPLING, LONG[:1], 1)
    assert seen[0] == 40
    assert_alike(changed, run(engine(other), SAMPLING, LONG[:1], 1))
    assert as_lists(changed) != as_lists(done)


def test_a_cache_kept_over_new_weights_is_what_the_version_prevents() -> None:
    """The planted mistake: new weights under the old version find the old keys and values."""
    made, other = engine(tiny()), tiny()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.3)
    run(made, SAMPLING)
    made.update_weights(other.named_parameters(), made.version)
    stale = run(made, SAMPLING)
    fresh = run(engine(other), SAMPLING)
    assert not torch.allclose(stale.log_probs.values[:1], fresh.log_probs.values[:1], atol=1e-3)


def test_a_conversation_goes_on_without_computing_its_beginning() -> None:
    decoder = tiny()
    made, seen = engine(decoder), computed(decoder)
    turn = run(made, Sampling(20, ignore_eos=True), LONG[:1], 1)
    conversation = LONG[0] + as_lists(turn)[0] + [50, 51, 52]
    seen.clear()
    again = run(made, SAMPLING, [conversation], 1)
    # all full blocks of the first turn are there; its last token has no keys and values yet
    assert seen[0] == len(conversation) - (40 + 20 - 1) // BLOCK * BLOCK
    assert_alike(again, run(engine(tiny()), SAMPLING, [conversation], 1))


@pytest.mark.parametrize("chunk", [1, 7, 16, 50])
def test_prompts_in_chunks_give_the_same_and_no_pass_is_longer(chunk: int) -> None:
    decoder = tiny()
    made, seen = engine(decoder, chunk_tokens=chunk), computed(decoder)
    assert_alike(run(made, SAMPLING), run(engine(tiny()), SAMPLING))
    assert max(seen) <= chunk + len(LONG) * 3


def test_a_long_prompt_does_not_hold_up_the_others() -> None:
    decoder = tiny()
    made, seen = engine(decoder, chunk_tokens=8), computed(decoder)
    prompts = [[5, 6], LONG[3]]
    done = run(made, Sampling(12, ignore_eos=True), prompts, 1)
    # while the long prompt comes in eights, the short one's response gets a token in every pass
    assert seen[0] == 8 and seen[1:8] == [9] * 7
    assert as_lists(done) == as_lists(run(engine(tiny()), Sampling(12, ignore_eos=True), prompts, 1))


@pytest.mark.parametrize("blocks", [8, 9, 12, 20])
def test_a_small_cache_sends_sequences_back_and_loses_nothing(blocks: int) -> None:
    made = engine(tiny(), cache_bytes=blocks * BLOCK_BYTES)
    sent_back = 0
    preempt = Scheduler._preempt

    def counted(self: Scheduler) -> None:
        nonlocal sent_back
        sent_back += 1
        preempt(self)

    Scheduler._preempt = counted
    try:
        done = run(made, SAMPLING)
    finally:
        Scheduler._preempt = preempt
    assert len(made._pool) == blocks == made._pool.available
    assert_alike(done, run(engine(tiny()), SAMPLING))
    assert sent_back or blocks > 12


@pytest.mark.parametrize("temperature", [0.0, 0.3, 1.0])
def test_guesses_change_nothing_but_the_number_of_passes(temperature: float) -> None:
    prompts = [[5, 6, 7, 8] * 6, [9, 9, 9, 9], LONG[0]]
    sampling = Sampling(40, temperature=temperature)
    guessed = Sampling(40, temperature=temperature, draft_tokens=4, draft_match=2)
    assert_alike(run(engine(tiny()), guessed, prompts), run(engine(tiny()), sampling, prompts))


def test_guesses_save_passes_where_a_response_repeats() -> None:
    decoder = tiny()
    seen = computed(decoder)
    guessed = Sampling(80, temperature=0.0, ignore_eos=True, draft_tokens=4, draft_match=2)
    (response,) = as_lists(run(engine(decoder), guessed, LONG[1:2], 1))
    assert len(set(response[-40:])) < 5  # the model goes round in a circle
    assert len(seen) < 60  # without guesses 80


def test_guesses_and_a_small_cache_and_chunks_together() -> None:
    sampling = Sampling(30, temperature=0.4, draft_tokens=3, draft_match=1)
    made = engine(tiny(), cache_bytes=9 * BLOCK_BYTES, chunk_tokens=5, max_sequences=4)
    assert_alike(run(made, sampling), run(engine(tiny()), Sampling(30, temperature=0.4)))


def test_a_call_that_has_enough_ends_and_another_goes_on_with_the_rest() -> None:
    sampling = Sampling(30, temperature=1.5)
    whole = run(engine(tiny()), sampling)
    made = engine(tiny(), max_sequences=6)
    part = run(made, sampling, enough=2)
    reasons = part.finish_reason.view(-1, 3)
    assert int((reasons != UNFINISHED).all(1).sum()) >= 2 and (reasons == UNFINISHED).any()
    made.update_weights((), 1)
    begun = [
        Begun(ids.tolist(), logs.tolist(), versions.tolist(), int(reason))
        for ids, logs, versions, reason in zip(
            part.response_ids.rows(), part.log_probs.rows(), part.versions.rows(), part.finish_reason, strict=True
        )
    ]
    rest = run(made, sampling, begun=begun)
    assert_alike(rest, whole)
    for versions, start in zip(rest.versions.rows(), begun, strict=True):
        assert versions.tolist() == [0] * len(start.response_ids) + [1] * (len(versions) - len(start.response_ids))


def test_no_block_is_held_after_a_call_that_failed() -> None:
    def fails(ids: list[int]) -> str:
        raise ValueError("no such token")

    made = NativeEngine(tiny(), [1], fails)
    with pytest.raises(ValueError, match="no such token"):
        run(made, Sampling(5, stop=("x",)))
    assert made._pool.available == len(made._pool) > 0


def test_no_block_is_held_after_a_call() -> None:
    made = engine(tiny())
    for sampling in (SAMPLING, Sampling(5, ignore_eos=True)):
        done = run(made, sampling)
        assert made._pool.available == len(made._pool)
    assert set(done.finish_reason.tolist()) == {LENGTH}
