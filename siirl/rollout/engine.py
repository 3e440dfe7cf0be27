"""The built-in rollout engine: continuous batching over a paged cache, a group's prompt held and computed once."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, SupportsInt

import numpy as np
import torch
from torch import Tensor

from siirl.errors import SiirlError
from siirl.model.decoder import Decoder
from siirl.rollout.blocks import BLOCK, BlockPool, Ints
from siirl.rollout.checksum import confirm
from siirl.rollout.choices import RouterChoices
from siirl.rollout.contract import UNFINISHED, Begun, Completions, SleepLevel
from siirl.rollout.drafts import guess
from siirl.rollout.graphs import Capture, Graphs
from siirl.rollout.sampler import Drawn, Sampler
from siirl.rollout.sampling import Sampling
from siirl.rollout.scheduler import Scheduler, Work
from siirl.rollout.sequences import Sequences
from siirl.rollout.state import PagedState, State, UncachedState, cache_bytes_per_token, cache_shape
from siirl_kernels import pages

if TYPE_CHECKING:
    from siirl.model.fallback import AnyDecoder


class NativeEngine:
    """Generates with the decoder itself. Give it training's own module and weight sync costs nothing.

    Args:
        decoder: the model; any other than :class:`Decoder` has no cache and is recomputed for every token.
        eos_ids: tokens that end a response.
        decode_text: tokens to text, for stop strings.
        max_sequences: sequences decoded together at most.
        cache_bytes: memory that the cache may take; it is kept from call to call, until the engine sleeps.
        chunk_tokens: tokens of prompts computed beside one token of every response.
        own_weights: nobody else computes with the decoder's weights, so that `sleep` may free them.
        capture: records decode steps (:func:`siirl.rollout.graphs.recorder`); None: every operator is launched.
        record_routing: completions say which experts each token went to; for a decoder that has some.
    """

    def __init__(
        self,
        decoder: AnyDecoder,
        eos_ids: Sequence[int],
        decode_text: Callable[[list[int]], str],
        max_sequences: int = 512,
        cache_bytes: int = 2**30,
        chunk_tokens: int = 8192,
        own_weights: bool = False,
        capture: Capture | None = None,
        record_routing: bool = False,
    ) -> None:
        self.decoder, self.version = decoder, 0
        self._eos_ids, self._decode_text = list(eos_ids), decode_text
        self._max_sequences, self._cache_bytes, self._chunk = max_sequences, cache_bytes, chunk_tokens
        # how many rows an expert has is known to the device alone, and a recording would keep it
        experts = isinstance(decoder, Decoder) and decoder.config.num_experts > 0
        self._own_weights, self._graphs = own_weights, Graphs(None if experts else capture)
        self._choices: RouterChoices | None = None
        if isinstance(decoder, Decoder) and experts and record_routing:
            self._choices = RouterChoices(decoder.config, self._device)
        self.cache: Tensor | None = None
        self._pool = BlockPool(0)  # the cache's blocks
        self._asleep: dict[str, Tensor] | None = None  # weights on the host, by name; dropped ones are on no device
        self._dropped: set[str] = set()
        self._aborts: deque[Tensor | None] = deque()

    def update_weights(
        self, named: Iterable[tuple[str, Tensor]], version: int, checksum: SupportsInt | None = None
    ) -> None:
        self._require_awake("take new weights")
        own = dict(self.decoder.named_parameters())
        received = []
        with torch.no_grad():
            for name, tensor in named:
                own[name].copy_(tensor)
                self._dropped.discard(name)
                received.append(name)
        if checksum is not None:
            confirm(version, checksum, own.items(), received, own)
        self.version = version

    def abort(self, sample_ids: Tensor | None = None) -> None:
        self._aborts.append(sample_ids)

    def sleep(self, level: SleepLevel = 1) -> None:
        self._graphs.forget()
        self.cache, self._pool = None, BlockPool(0)
        if self._choices is not None:
            self._choices.free()
        if self._asleep is not None:
            return
        self._asleep = {}
        for name, weight in self.decoder.named_parameters() if self._own_weights else ():
            self._asleep[name] = weight.data.to("cpu" if level == 1 else "meta")
            weight.data = weight.data.new_empty(0)

    def wake(self) -> None:
        if self._asleep is None:
            return
        for name, weight in self.decoder.named_parameters() if self._own_weights else ():
            kept = self._asleep[name]
            if kept.is_meta:
                weight.data = torch.empty_like(kept, device=weight.device)
                self._dropped.add(name)
            else:
                weight.data = kept.to(weight.device)
        self._asleep = None

    def _require_awake(self, purpose: str) -> None:
        if self._asleep is not None:
            raise SiirlError(f"the rollout engine is asleep and cannot {purpose}: wake it first")

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
        self._require_awake("generate")
        if self._dropped:
            raise SiirlError(f"the weight '{min(self._dropped)}' was dropped while the rollout engine slept: update it")
        self._aborts.clear()
        sequences = Sequences(prompts, sample_ids, sampling, group_size, seed, begun)
        with torch.inference_mode():
            self._run(sequences, sample_ids, sampling, len(prompts) if enough is None else enough)
        done = sequences.completions(self.version)
        return done if self._choices is None else replace(done, router_choices=self._choices.column(sequences))

    def _run(self, sequences: Sequences, sample_ids: Tensor, sampling: Sampling, enough: int) -> None:
        sampler = Sampler(sampling, self._eos_ids, sequences, self._device)
        state, rows = self._state(sequences)
        scheduler = Scheduler(sequences, self._pool, rows, self._chunk, self.version, state.copy)
        try:
            while scheduler.unfinished and sequences.whole_groups() < enough:
                guesses = None
                if sampling.draft_tokens:
                    drawing = scheduler.drawing
                    guesses = guess(sequences, drawing, sampling.draft_tokens, sampling.draft_match)
                work = scheduler.next(guesses)
                hidden_TH = state.forward(sequences, work, scheduler.tables)
                draws = _draws(work, *scheduler.computed(work), guesses)
                if len(draws.rows):
                    logits_DV = state.logits(hidden_TH[torch.from_numpy(draws.at).to(hidden_TH.device)])
                    drawn = sampler(logits_DV, draws.rows, sequences.drawn[draws.rows] + draws.ahead)
                    self._append(sequences, draws, drawn, sampling.stop)
                    if guesses is not None:
                        scheduler.settle(draws.rows)
                aborted = self._end_aborted(sequences, sample_ids)
                if self._choices is not None:
                    self._choices.collect(sequences, scheduler)
                scheduler.leave_ended(others=aborted)
        finally:  # the pool outlives a call that failed
            scheduler.stop()

    @property
    def _device(self) -> torch.device:
        return self.decoder.head_weight.device

    def _state(self, sequences: Sequences) -> tuple[State, int]:
        """The state of a call, and the rows that may run at once."""
        rows = max(1, min(self._max_sequences, len(sequences)))
        longest = sequences.tokens.shape[1]
        blocks = -(-longest // BLOCK) + 1
        if not isinstance(self.decoder, Decoder):
            self._pool = BlockPool(rows * blocks)  # without memory
            return UncachedState(self.decoder), rows
        dtype = self.decoder.head_weight.dtype
        affordable = self._cache_bytes // (BLOCK * cache_bytes_per_token(self.decoder.config, dtype))
        affordable -= self._graphs.spare_blocks
        cache = self._cache_of(self.decoder, max(blocks, min(rows * blocks, affordable)))
        if self._choices is not None:
            self._choices.begin(cache.shape[2])
            return PagedState(self.decoder, cache, self._choices), rows
        return self._graphs.state(self.decoder, cache, rows, longest), rows

    def _cache_of(self, decoder: Decoder, blocks: int) -> Tensor:
        """The cache of earlier calls, made larger where it has to be; it keeps its prefixes if both fit the budget."""
        shape = cache_shape(decoder.config, blocks + self._graphs.spare_blocks)
        if self.cache is not None and len(self._pool) < blocks:
            self._graphs.forget()
            size = math.prod(shape) * self.cache.itemsize
            if self.cache.nbytes + size <= self._cache_bytes:
                grown = pages.empty(shape, self.cache)
                grown[:, :, : len(self._pool)] = self.cache[:, :, : len(self._pool)]
                self.cache = grown
                self._pool.grow(blocks)
            else:
                self.cache = None  # freed before more is asked for
        if self.cache is None:
            self.cache = pages.empty(shape, decoder.head_weight)
            self._pool = BlockPool(blocks)
        return self.cache

    def _append(self, sequences: Sequences, draws: Draws, drawn: Drawn, stop: Sequence[str]) -> None:
        """Give each row its tokens: of those drawn behind guesses as many as there were right guesses before."""
        going = np.ones(len(sequences), bool)
        for step in range(int(draws.ahead.max()) + 1):
            now = np.flatnonzero((draws.ahead == step) & going[draws.rows])
            rows, tokens = draws.rows[now], drawn.tokens[now]
            guessed = sequences.tokens[rows, sequences.lengths[rows]]
            top = None if drawn.top is None else (drawn.top[0][now], drawn.top[1][now])
            sequences.append(rows, tokens, drawn.log_probs[now], top, self.version)
            stopped = drawn.ends[now]
            if stop:
                texts = (self._decode_text(sequences.response(row)) for row in rows.tolist())
                stopped = stopped | np.array([any(s in text for s in stop) for text in texts], bool)
            sequences.end(rows, stopped)
            going[rows] = (sequences.finish[rows] == UNFINISHED) & (tokens == guessed)

    def _end_aborted(self, sequences: Sequences, sample_ids: Tensor) -> bool:
        """Whether there was something to abort."""
        told = bool(self._aborts)
        while self._aborts:
            ids = self._aborts.popleft()
            sequences.abort(torch.isin(sample_ids, sample_ids if ids is None else ids).numpy())
        return told


@dataclass(frozen=True)
class Draws:
    """Tokens to draw, int64 [D] each.

    Attributes:
        rows: whose.
        ahead: behind how many guesses of that row.
        at: by which of the hidden states.
    """

    rows: Ints
    ahead: Ints
    at: Ints


def _draws(work: Work, rows: Ints, places: Ints, guesses: Ints | None) -> Draws:
    """For each of ``rows``, at its place among those of ``work``, a draw behind its known tokens and each guess."""
    last = work.last[places]
    if guesses is None:
        return Draws(rows, np.zeros_like(rows), last)
    number = 1 + guesses[rows]
    ahead = np.arange(int(number.sum())) - (number.cumsum() - number).repeat(number)
    return Draws(rows.repeat(number), ahead, (last - guesses[rows]).repeat(number) + ahead)
