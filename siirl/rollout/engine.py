"""The built-in rollout engine: batched decoding with continuous refill, a group's prompt computed once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from siirl.data.batch import Ragged
from siirl.model.decoder import Decoder
from siirl.rollout.sampling import Sampling, draw, uniforms
from siirl.rollout.state import CachedState, SequenceState, UncachedState, cache_bytes_per_token

if TYPE_CHECKING:
    from siirl.model.fallback import AnyDecoder

STOP, LENGTH = 0, 1
# prompts are computed in forward passes of at most so many tokens
_PREFILL_TOKENS = 8192


@dataclass(frozen=True)
class Completions:
    """Responses, in the order of the sample ids asked for.

    Attributes:
        response_ids: int64, ragged; ends with the end-of-sequence token where one was drawn.
        log_probs: float32, ragged like the responses.
        finish_reason: int8 [rows], ``STOP`` or ``LENGTH``.
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

    def update_weights(self, named: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Take over new weights."""
        ...


class NativeEngine:
    """Generates with the decoder itself. Give it training's own module and weight sync costs nothing.

    Args:
        decoder: the model; ``supports_cache = False`` marks one that is recomputed for every token.
        eos_ids: tokens that end a response.
        decode_text: tokens to text, for stop strings.
        max_sequences: sequences decoded together at most.
        cache_bytes: memory that the cache may take.
    """

    def __init__(
        self,
        decoder: AnyDecoder,
        eos_ids: Sequence[int],
        decode_text: Callable[[list[int]], str],
        max_sequences: int = 512,
        cache_bytes: int = 2**30,
    ) -> None:
        self.decoder, self.version = decoder, 0
        self._eos_ids, self._decode_text = list(eos_ids), decode_text
        self._max_sequences, self._cache_bytes = max_sequences, cache_bytes

    def update_weights(self, named: Iterable[tuple[str, Tensor]], version: int) -> None:
        own = dict(self.decoder.named_parameters())
        with torch.no_grad():
            for name, tensor in named:
                own[name].copy_(tensor)
        self.version = version

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[Sequence[int]], sample_ids: Tensor, sampling: Sampling, group_size: int, seed: int
    ) -> Completions:
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
        return capacity, CachedState(self.decoder, capacity, length)

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
        return ~ended_B & (place + 1 < self._tokens.shape[1])

    def completions(self, version: int) -> Completions:
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
