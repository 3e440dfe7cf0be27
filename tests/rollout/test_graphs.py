"""Decode steps that are recorded and replayed say what launched ones say, whatever comes and goes between them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from siirl.device import Unsupported
from siirl.rollout import graphs
from siirl.rollout.blocks import BLOCK
from siirl.rollout.contract import SleepLevel
from siirl.rollout.engine import NativeEngine
from siirl.rollout.graphs import Step, padded_blocks, padded_rows, recorder
from siirl.rollout.sampling import Sampling
from siirl_kernels import bind
from siirl_kernels.invariant import invariant_pins
from siirl_kernels.registry import obstacle
from tests.device_under_test import NAME, backend
from tests.rollout.recording import Counting, broken, call_again, on_tape
from tests.rollout.test_cache import BLOCK_BYTES, LONG, assert_alike, run
from tests.rollout.test_engine import as_lists, engine, tiny

# How work is recorded, and the kernels that bear it: a tape hears PyTorch's operators alone.
WAYS = ("tape", "again") if NAME == "cpu" else ("device",)
ENDS = tuple(range(2, 12))  # so many tokens end a response that a batch shrinks token by token
LATE = Sampling(30, temperature=1.5, stop_ids=ENDS)


@pytest.fixture(params=WAYS)
def capture(request: pytest.FixtureRequest) -> Iterator[Counting]:
    order, pins, chosen = backend().kernel_order(), None, backend().capture
    if request.param == "tape":
        order, chosen = ["torch"], on_tape
    elif request.param == "again":
        if why := obstacle("invariant"):
            pytest.skip(why)
        pins, chosen = invariant_pins(), call_again
    bind(order, pins)
    yield Counting(chosen, exact=pins is not None)
    bind(backend().kernel_order())


def assert_same(done: Any, other: Any, capture: Counting) -> None:
    """Bit for bit where a token's bits do not depend on the batch: rows that pad it are a batch of another size."""
    assert_alike(done, other)
    if capture.exact:
        assert torch.equal(done.log_probs.values, other.log_probs.values)


CALLS: dict[str, tuple[Sampling, dict[str, Any]]] = {
    "greedy": (Sampling(30, temperature=0.0, ignore_eos=True), {}),
    "ends one after the other": (LATE, {}),
    "waits for room": (LATE, {"max_sequences": 4}),
    "prompts in chunks": (LATE, {"chunk_tokens": 7}),
    "sent back": (LATE, {"cache_bytes": 10 * BLOCK_BYTES}),
    "guesses": (replace(LATE, draft_tokens=3, draft_match=2), {}),
    "penalties and filters": (replace(LATE, top_k=20, repetition_penalty=1.3, min_new_tokens=5), {}),
}


@pytest.mark.parametrize("name", CALLS)
def test_replayed_steps_draw_what_launched_ones_draw(name: str, capture: Counting) -> None:
    sampling, options = CALLS[name]
    launched = run(engine(tiny(), **options), sampling)
    assert_same(run(engine(tiny(), capture=capture, **options), sampling), launched, capture)
    assert capture.replayed > capture.recorded > 0
    if name == "ends one after the other":
        assert len(set(map(len, as_lists(launched)))) > 5 and capture.recorded >= 3


def test_a_prompt_of_one_token_is_a_step_too_and_its_group_draws_behind_one_row(capture: Counting) -> None:
    launched = run(engine(tiny()), LATE, [[7]], 5)
    assert_same(run(engine(tiny(), capture=capture), LATE, [[7]], 5), launched, capture)
    assert capture.recorded >= 2  # of one row, and of five


def test_new_weights_are_read_by_old_recordings(capture: Counting) -> None:
    made, other = engine(tiny(), capture=capture), tiny()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.3)
    old = run(made, LATE, LONG[:2])
    recorded = capture.recorded
    made.update_weights(other.named_parameters(), 1)
    greedy = replace(LATE, temperature=0.0, stop_ids=(), max_new_tokens=8)
    for sampling in (LATE, greedy):
        assert_same(run(made, sampling, LONG[:2]), run(engine(other), sampling, LONG[:2]), capture)
    assert as_lists(run(made, LATE, LONG[:2])) != as_lists(old)
    assert capture.recorded <= recorded + 3  # sizes that the first call did not have


def test_weights_that_moved_are_recorded_anew(capture: Counting) -> None:
    """As training moves them that takes its parameters off the device and brings them back."""
    decoder = tiny()
    made = engine(decoder, capture=capture)
    run(made, LATE)
    for parameter in decoder.parameters():
        parameter.data = parameter.data * 1.3
    made.version = 1
    fresh = tiny()
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.mul_(1.3)
    assert_same(run(made, LATE), run(engine(fresh), LATE), capture)


@pytest.mark.parametrize("level", [1, 2])
def test_an_engine_that_slept_records_anew(level: SleepLevel, capture: Counting) -> None:
    made, weights = engine(tiny(), own_weights=True, capture=capture), dict(tiny().named_parameters())
    before = run(made, LATE)
    recorded = capture.recorded
    made.sleep(level)
    assert not made._graphs._steps and made._graphs._inputs is None and made.cache is None
    made.wake()
    if level == 2:
        made.update_weights(weights.items(), 1)
    assert_same(run(made, LATE), before, capture)
    assert capture.recorded == 2 * recorded


def test_a_cache_that_grows_is_recorded_anew_and_keeps_its_prefixes(capture: Counting) -> None:
    made, long = engine(tiny(), capture=capture), replace(LATE, max_new_tokens=90)
    run(made, LATE, LONG[:1])
    blocks, recorded = len(made._pool), capture.recorded
    again = run(made, long, LONG[:4])
    assert len(made._pool) > blocks and capture.recorded > recorded
    assert made.cache is not None and made.cache.shape[2] == len(made._pool) + 1
    assert_same(again, run(engine(tiny()), long, LONG[:4]), capture)
    recorded = capture.recorded
    assert_same(run(made, long, LONG[:4]), again, capture)
    assert_same(run(made, LATE, LONG[:1]), run(engine(tiny()), LATE, LONG[:1]), capture)
    assert capture.recorded <= recorded + 2  # fewer rows than ever before


def test_a_replay_reads_and_writes_no_block_that_is_not_its_own(capture: Counting) -> None:
    """What no sequence holds is NaN before, and what is not written stays it."""
    made = engine(tiny(), capture=capture)
    run(made, LATE)  # makes the cache
    made.update_weights((), 1)  # and forgets what it holds
    assert made.cache is not None
    with torch.inference_mode():
        made.cache.fill_(torch.nan)
    assert_same(run(made, LATE, LONG[1:4]), run(engine(tiny()), LATE, LONG[1:4]), capture)
    touched = ~made.cache.isnan().all(-1).all(-1)[0, 0]  # [blocks, slots]
    assert touched.sum() < touched.numel() / 2
    assert touched[-1].tolist() == [True] + [False] * (BLOCK - 1)  # the block that nobody has: one slot for all
    for block in touched[:-1].tolist():
        assert block == sorted(block, reverse=True)  # filled from its beginning


def test_recordings_share_their_memory(capture: Counting) -> None:
    run(engine(tiny(), capture=capture), LATE)
    assert capture.beside == capture.recorded - 1 > 0


def test_a_device_that_records_no_more_launches_the_rest(caplog: pytest.LogCaptureFixture, capture: Counting) -> None:
    def two(*arguments: Any) -> Any:
        if capture.recorded == 2:
            raise Unsupported("it has no room for more graphs")
        return capture(*arguments)

    with caplog.at_level(logging.INFO, logger=graphs.__name__):
        made = engine(tiny(), capture=two)
        for _ in range(2):
            assert_same(run(made, LATE), run(engine(tiny()), LATE), capture)
    assert capture.recorded == 2 and capture.replayed > 2
    assert [line.levelname for line in caplog.records] == ["INFO", "WARNING"]
    assert caplog.messages[0].startswith("decode steps are recorded and replayed, first that of 16 rows and 8 blocks")
    assert caplog.messages[1].endswith("it has no room for more graphs")


# Mistakes that these tests must notice.


def stale_lengths(patch: pytest.MonkeyPatch) -> None:
    fill = Step._fill

    def forgetful(self: Step, *arguments: Any) -> None:
        fill(self, *arguments)
        if len(arguments[0]):
            if not hasattr(self, "first"):
                self.first = self._places[: self._rows].clone()
            self._places[: self._rows] = self.first

    patch.setattr(Step, "_fill", forgetful)


def padding_in_block_0(patch: pytest.MonkeyPatch) -> None:
    fill = Step._fill

    def careless(self: Step, *arguments: Any) -> None:
        self._scratch = 0
        fill(self, *arguments)

    patch.setattr(Step, "_fill", careless)


@pytest.mark.skipif(NAME != "cpu", reason="plants mistakes on the host")
@pytest.mark.parametrize(
    ("plant", "capture"),
    [(stale_lengths, call_again), (padding_in_block_0, call_again), (lambda patch: None, broken)],
    ids=["stale lengths", "padding in block 0", "nothing replayed"],
)
def test_mistakes_are_noticed(
    plant: Callable[[pytest.MonkeyPatch], None], capture: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    launched = run(engine(tiny()), LATE)
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        assert_alike(run(engine(tiny(), capture=capture), LATE), launched)


# Sizes and choices.


def test_sizes_hold_what_they_are_asked_for_and_waste_little() -> None:
    assert [padded_rows(n) for n in (1, 2, 3, 4, 5, 8, 9, 17, 255, 256, 257, 512)] == [
        *(1, 2, 4, 4, 8, 8, 16, 24, 256, 256, 272, 512)
    ]
    assert [padded_blocks(n) for n in (1, BLOCK, BLOCK + 1, 3 * BLOCK, 5 * BLOCK)] == [1, 1, 2, 4, 8]


def test_only_a_device_that_records_is_asked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    device = backend()
    facts = replace(device.capabilities(), graph_capture="none")
    monkeypatch.setattr(device, "capabilities", lambda: facts)
    assert recorder(device, True) is None
    facts = replace(facts, graph_capture="inference")
    assert recorder(device, True) == device.capture and recorder(device, False) is None


def test_without_recording_the_cache_has_no_block_to_spare() -> None:
    made: NativeEngine = engine(tiny(), cache_bytes=9 * BLOCK_BYTES)
    run(made, LATE)
    assert made.cache is not None and made.cache.shape[2] == len(made._pool) == 9
    made = engine(tiny(), cache_bytes=9 * BLOCK_BYTES, capture=call_again)
    run(made, LATE)
    assert made.cache is not None and made.cache.shape[2] == len(made._pool) + 1 == 9
