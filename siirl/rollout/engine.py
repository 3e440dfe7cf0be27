"""The built-in rollout engine: batched decoding with continuous refill, a group's prompt computed once."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor

from siirl.data.batch import Ragged
from siirl.errors import SiirlError
from siirl.model.decoder import Decoder
from siirl.rollout.checksum import confirm
from siirl.rollout.sampling import Sampling, draw, uniforms
from siirl.rollout.state import CachedState, SequenceState, UncachedState, cache_bytes_per_token, cache_shape

if TYPE_CHECKING:
    from siirl.model.fallback import AnyDecoder

SleepLevel = Literal[1, 2]
STOP, LENGTH, ABORTED = 0, 1, 2
# prompts are computed in forward passes of at most so many tokens
_PREFILL_TOKENS = 8192


@dataclass(frozen=True)
class Completions:
    """Responses, in the order of the sample ids asked for.

    Attributes:
        response_ids: int64, ragged; ends with the end-of-sequence token where one was drawn.
        log_probs: float32, ragged like the responses.
        finish_reason: int8 [rows], ``STOP``, ``LENGTH`` or ``ABORTED``; only an aborted response may be empty.
        version: of the weights that drew them.
    """

    response_ids: Ragged
    log_probs: Ragged
    finish_reason: Tensor
    version: int


class RolloutEngine(Protocol):
    """What a rollout engine does."""

    version: int

    def generate(
        self, prompts: Sequence[Sequence[int]], sample_ids: Tensor, sampling: Sampling, group_size: int, seed: int
    ) -> Completions:
        """Draw ``group_size`` responses to each prompt; ``sample_ids`` is int64 [prompts · group_size]."""
        ...

    def update_weights(self, named: Iterable[tuple[str, Tensor]], version: int, checksum: int | None = None) -> None:
        """Take over new weights, and confirm them.

        Args:
            named: the weights; none where the engine computes with training's own tensors.
            version: that `Completions.version` gives from now on.
            checksum: of all weights in the engine's dtype (:func:`siirl.rollout.checksum.weights_checksum`); None:
                nothing is confirmed.

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


class NativeEngine:
    """Generates with the decoder itself. Give it training's own module and weight sync costs nothing.

    Args:
        decoder: the model; ``supports_cache = False`` marks one that is recomputed for every token.
        eos_ids: tokens that end a response.
        decode_text: tokens to text, for stop strings.
        max_sequences: sequences decoded together at most.
        cache_bytes: memory that the cache may take; it is kept from call to call, until the engine sleeps.
        own_weights: nobody else computes with the decoder's weights, so that `sleep` may free them.
    """

    def __init__(
        self,
        decoder: AnyDecoder,
        eos_ids: Sequence[int],
        decode_text: Callable[[list[int]], str],
        max_sequences: int = 512,
        cache_bytes: int = 2**30,
        own_weights: bool = False,
    ) -> None:
        self.decoder, self.version = decoder, 0
        self._eos_ids, self._decode_text = list(eos_ids), decode_text
        self._max_sequences, self._cache_bytes, self._own_weights = max_sequences, cache_bytes, own_weights
        self._room: Tensor | None = None  # memory of the cache
        self._asleep: dict[str, Tensor] | None = None  # weights on the host, by name; dropped ones are on no device
        self._dropped: set[str] = set()
        self._aborts: deque[Tensor | None] = deque()

    def update_weights(self, named: Iterable[tuple[str, Tensor]], version: int, checksum: int | None = None) -> None:
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
        self._room = None
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

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[Sequence[int]], sample_ids: Tensor, sampling: Sampling, group_size: int, seed: int
    ) -> Completions:
        self._require_awake("generate")
        if self._dropped:
            raise SiirlError(f"the weight '{min(self._dropped)}' was dropped while the rollout engine slept: update it")
        self._aborts.clear()
        responses = _Responses(len(prompts) * group_size, sampling, self._stop_check(sampling))
        noise = uniforms(seed, sample_ids, sampling.max_new_tokens).to(self._device)
        forbidden = self._eos_tensor if sampling.ignore_eos else None
        waiting = list(range(len(prompts)))[::-1]
        capacity, state = self._state(prompts, sampling, group_size)
        sequence_B = torch.empty(0, dtype=torch.int64)  # which response each row is
        hidden_BH: Tensor | None = None
        while waiting or state.rows:
            admitted = self._admit(waiting, prompts, (capacity - state.rows) // group_size)
            if admitted:
                new = state.admit([prompts[i] for i in admitted], group_size)
                hidden_BH = new if hidden_BH is None else torch.cat((hidden_BH, new))
                first = torch.tensor(admitted)[:, None] * group_size
                sequence_B = torch.cat((sequence_B, (first + torch.arange(group_size)).flatten()))
            assert hidden_BH is not None
            place_B = responses.lengths[sequence_B]
            logits_BV = self.decoder.logits(hidden_BH)
            tokens_B, log_probs_B = draw(logits_BV, sampling, noise[sequence_B, place_B], forbidden)
            while self._aborts:
                ids = self._aborts.popleft()
                aborted = responses.abort(torch.isin(sample_ids, sample_ids if ids is None else ids))
                waiting = [i for i in waiting if not aborted[i * group_size : (i + 1) * group_size].all()]
            alive = responses.append(sequence_B, tokens_B.cpu(), log_probs_B.cpu(), self._eos(tokens_B, sampling))
            order = compact(alive)
            if len(order) < state.rows:
                state.keep(order)
                sequence_B, tokens_B = sequence_B[order], tokens_B[order.to(tokens_B.device)]
            hidden_BH = state.step(tokens_B) if state.rows else None
        return responses.completions(self.version)

    @property
    def _device(self) -> torch.device:
        return self.decoder.head_weight.device

    def _state(self, prompts: Sequence[Sequence[int]], sampling: Sampling, group: int) -> tuple[int, SequenceState]:
        wanted = min(max(self._max_sequences, group), len(prompts) * group)
        if not isinstance(self.decoder, Decoder):
            return wanted, UncachedState(self.decoder)
        length = max((len(p) for p in prompts), default=1) + sampling.max_new_tokens
        row_bytes = length * cache_bytes_per_token(self.decoder.config, self.decoder.head_weight.dtype)
        capacity = max(group, min(wanted, self._cache_bytes // row_bytes))
        return capacity, CachedState(self.decoder, self._cache(cache_shape(self.decoder.config, capacity, length)))

    def _cache(self, shape: tuple[int, ...]) -> Tensor:
        """Zeros, in the memory of the last call where it is large enough: fresh memory costs more than clearing it."""
        count = math.prod(shape)
        if self._room is None or self._room.numel() < count:
            self._room = None  # freed before more is asked for
            self._room = self.decoder.head_weight.new_empty(count)
        return self._room[:count].zero_().view(shape)

    def _admit(self, waiting: list[int], prompts: Sequence[Sequence[int]], groups: int) -> list[int]:
        """Take prompts from ``waiting`` for free rows, as many as one prefill pass holds."""
        taken: list[int] = []
        tokens = 0
        while waiting and len(taken) < groups:
            tokens += len(prompts[waiting[-1]])
            if taken and tokens > _PREFILL_TOKENS:
                break
            taken.append(waiting.pop())
        return taken

    @property
    def _eos_tensor(self) -> Tensor:
        return torch.tensor(self._eos_ids, dtype=torch.int64, device=self._device)

    def _eos(self, tokens_B: Tensor, sampling: Sampling) -> Tensor:
        if sampling.ignore_eos:
            return torch.zeros(len(tokens_B), dtype=torch.bool)
        return torch.isin(tokens_B, self._eos_tensor).cpu()

    def _stop_check(self, sampling: Sampling) -> Callable[[list[int]], bool] | None:
        if not sampling.stop:
            return None
        return lambda ids: any(stop in self._decode_text(ids) for stop in sampling.stop)


class _Responses:
    """Tokens drawn so far, on the host."""

    def __init__(self, count: int, sampling: Sampling, stop: Callable[[list[int]], bool] | None) -> None:
        shape = (count, sampling.max_new_tokens)
        self.lengths = torch.zeros(count, dtype=torch.int64)
        self._aborted: Tensor | None = None
        self._tokens = torch.zeros(shape, dtype=torch.int64)
        self._log_probs = torch.zeros(shape, dtype=torch.float32)
        self._finish = torch.full((count,), LENGTH, dtype=torch.int8)
        self._stop = stop

    def append(self, sequence_B: Tensor, tokens_B: Tensor, log_probs_B: Tensor, ended_B: Tensor) -> Tensor:
        """Append a token to each response; True for those that go on."""
        place = self.lengths[sequence_B]
        self._tokens[sequence_B, place] = tokens_B
        self._log_probs[sequence_B, place] = log_probs_B
        self.lengths[sequence_B] = place + 1
        if self._stop is not None:
            texts = [self._stop(self._tokens[s, : p + 1].tolist()) for s, p in zip(sequence_B, place, strict=True)]
            ended_B = ended_B | torch.tensor(texts)
        self._finish[sequence_B[ended_B]] = STOP
        alive_B = ~ended_B & (place + 1 < self._tokens.shape[1])
        return alive_B if self._aborted is None else alive_B & ~self._aborted[sequence_B]

    def abort(self, which: Tensor) -> Tensor:
        """End responses at their next token; bool [count], those aborted so far."""
        self._aborted = which if self._aborted is None else self._aborted | which
        return self._aborted

    def completions(self, version: int) -> Completions:
        unfinished = (self._finish == LENGTH) & (self.lengths < self._tokens.shape[1])
        self._finish[unfinished] = ABORTED
        filled = torch.arange(self._tokens.shape[1])[None, :] < self.lengths[:, None]
        offsets = torch.cat((torch.zeros(1, dtype=torch.int64), self.lengths.cumsum(0)))
        tokens, log_probs = Ragged(self._tokens[filled], offsets), Ragged(self._log_probs[filled], offsets)
        return Completions(tokens, log_probs, self._finish, version)


def compact(alive_B: Tensor) -> Tensor:
    """An order of the rows that are alive in which the fewest move: holes are filled from the end.

    Args:
        alive_B: bool [B].

    Returns:
        int64 [number alive]: the row that comes to each place; ``order[i] >= i``.
    """
    count = int(alive_B.sum())
    order = torch.arange(count)
    order[~alive_B[:count]] = count + alive_B[count:].nonzero().squeeze(1)
    return order
