"""vLLM as the rollout engine, on every device that vLLM has a platform for: token ids in, token ids and log-probs out.

The engine runs inside the worker's process, so new weights are loaded in place and no copy crosses processes. Its model
starts from a configuration and random weights: every weight comes through `VllmEngine.update_weights`.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from siirl.data.batch import Ragged
from siirl.device.backend import Backend
from siirl.errors import RequestError, SiirlError
from siirl.model.fallback import AnyDecoder
from siirl.rollout import vllm_model as model_side
from siirl.rollout.checksum import Checksum, require_alike
from siirl.rollout.contract import ABORTED, LENGTH, STOP, Begun, Completions, SleepLevel
from siirl.rollout.sampling import Sampling
from siirl.rollout.vllm_process import guest_random_state, starting
from siirl.rollout.vllm_sampling import vllm_sampling
from siirl.rollout.vllm_setup import VllmSize, options_of, published, start


class VllmEngine:
    """A :class:`siirl.rollout.contract.RolloutEngine` that drives vLLM.

    Where ``tensor`` is above 1, so many neighbouring workers compute one model together: all workers of the process
    group make an engine at the same time, and those of one group make the same calls with the same arguments.

    Args:
        decoder: gives the configuration and the names of the weights; it is not kept.
        eos_ids: tokens that end a response.
        decode_text: tokens to text, for stop strings.
        backend: of this worker; its engine specification's options go to vLLM.
        dtype: of weights and cache.
        size: of what it has to hold.
        tensor: degree of tensor parallelism.

    Raises:
        RequestError: vLLM cannot run the model on this device.
    """

    def __init__(
        self,
        decoder: AnyDecoder,
        eos_ids: Sequence[int],
        decode_text: Callable[[list[int]], str],
        backend: Backend,
        dtype: torch.dtype,
        size: VllmSize,
        tensor: int = 1,
    ) -> None:
        self.version = 0
        self._eos_ids, self._decode_text, self._size = list(eos_ids), decode_text, size
        self._dtype, self._weights = dtype, [name for name, _ in decoder.named_parameters()]
        self._names = {published(name) for name in self._weights}
        self._missing = set(self._names)
        self._asleep = False
        self._aborts: deque[Tensor | None] = deque()
        self._calls = 0
        options = options_of(backend)
        self._device_sleeps = bool(options.get("enable_sleep_mode"))
        self._directory = tempfile.TemporaryDirectory(prefix="siirl-vllm-")  # vLLM may read it at any time
        with starting(backend, tensor):
            self._engine = start(decoder, dtype, size, tensor, options, self._directory.name)
        self._engine.apply_model(model_side.require_head_size)
        self._heat, self._cache = model_side.Temperature(), model_side.Cache()
        self._engine.apply_model(self._heat.attach)

    def update_weights(self, named: Iterable[tuple[str, Tensor]], version: int, checksum: int | None = None) -> None:
        """See :class:`siirl.rollout.contract.RolloutEngine`.

        vLLM keeps weights fused and packed, so what arrived is confirmed; the parity probe judges what it holds.
        """
        self._require_awake("take new weights")
        received: list[str] = []
        summed = Checksum(self._dtype)

        def arriving() -> Iterable[tuple[str, Tensor]]:
            for tensor in summed.passing(noted()):
                yield published(received[-1]), tensor

        def noted() -> Iterable[tuple[str, Tensor]]:
            for name, tensor in named:
                received.append(name)
                yield name, tensor

        self._engine.collective_rpc(model_side.load_weights, args=(arriving(),))
        self._missing -= {published(name) for name in received}
        require_alike(version, checksum, summed, received, self._weights)
        self._engine.reset_prefix_cache()  # computed with the old weights
        self.version = version

    def abort(self, sample_ids: Tensor | None = None) -> None:
        self._aborts.append(sample_ids)

    def sleep(self, level: SleepLevel = 1) -> None:
        if self._asleep:
            return
        self._asleep = True
        self._engine.reset_prefix_cache()
        if self._device_sleeps:
            self._engine.sleep(level)
            self._missing = set(self._names) if level == 2 else self._missing
        else:
            self._engine.collective_rpc(self._cache.free)

    def wake(self) -> None:
        if not self._asleep:
            return
        if self._device_sleeps:
            self._engine.wake_up()
        else:
            self._engine.collective_rpc(self._cache.restore)
        self._asleep = False

    def _require_awake(self, purpose: str) -> None:
        if self._asleep:
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
        """See :class:`siirl.rollout.contract.RolloutEngine`. Every response is drawn whole by one call."""
        if any(begun) or enough is not None:
            raise RequestError("vLLM draws whole responses; set rollout.engine=native for rollout.partial")
        self._require_awake("generate")
        if self._missing:
            raise SiirlError(f"vLLM has no weight '{min(self._missing)}' yet, or lost it while it slept: update it")
        self._check_lengths(prompts, sampling)
        self._aborts.clear()
        self._calls += 1
        self._heat.set(sampling.temperature)
        rows = [_Row(f"{self._calls}:{i}") for i in range(len(sample_ids))]
        with guest_random_state():
            try:
                self._submit(rows, prompts, sample_ids.tolist(), sampling, group_size, seed)
                self._run(rows, sample_ids, sampling)
            finally:  # nothing of a call that failed is left for the next one
                self._engine.abort_request([row.name for row in rows if row.running])
        return _completions(rows, self.version)

    def _check_lengths(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> None:
        longest = max((len(prompt) for prompt in prompts), default=0) + sampling.max_new_tokens
        if longest > self._size.max_length:
            raise RequestError(
                f"a prompt and its response may have {longest} tokens, and vLLM was started for "
                f"{self._size.max_length} (data.max_prompt_tokens + rollout.max_new_tokens)"
            )

    def _submit(
        self,
        rows: list[_Row],
        prompts: Sequence[Sequence[int]],
        sample_ids: list[int],
        sampling: Sampling,
        group_size: int,
        seed: int,
    ) -> None:
        parameters = vllm_sampling(sampling, self._eos_ids)
        for i, row in enumerate(rows):
            # copies of one another but for the seed: a group's prompt is found in the prefix cache
            prompt = {"prompt_token_ids": list(prompts[i // group_size])}
            self._engine.add_request(row.name, prompt, parameters(sample_seed(seed, sample_ids[i])))

    def _run(self, rows: list[_Row], sample_ids: Tensor, sampling: Sampling) -> None:
        by_name = {row.name: row for row in rows}
        ends = partial(self._ends, sampling.stop)
        while self._engine.has_unfinished_requests():
            stopped = []
            for output in self._engine.step():
                row = by_name[output.request_id]
                row.take(output.outputs[0], output.finished)
                if sampling.stop and ends(row.tokens):
                    stopped += [row.name] if row.running else []
                    row.finish(STOP)
            stopped += self._aborted(rows, sample_ids)
            if stopped:
                self._engine.abort_request(stopped)

    def _ends(self, stop: Sequence[str], tokens: list[int]) -> bool:
        text = self._decode_text(tokens)
        return any(string in text for string in stop)

    def _aborted(self, rows: list[_Row], sample_ids: Tensor) -> list[str]:
        """Names of running requests that `abort` asked to end since the last step; they are marked."""
        names = []
        while self._aborts:
            ids = self._aborts.popleft()
            wanted = torch.isin(sample_ids, sample_ids if ids is None else ids).tolist()
            for row in (row for row, ending in zip(rows, wanted, strict=True) if ending and row.running):
                row.finish(ABORTED)
                names.append(row.name)
        return names


class _Row:
    """A response on its way."""

    def __init__(self, name: str) -> None:
        self.name, self.running, self.reason = name, True, ABORTED
        self.tokens: list[int] = []
        self.log_probs: list[float] = []

    def take(self, output: Any, finished: bool) -> None:
        """Append what a step of vLLM has drawn."""
        if not self.running:
            return
        self.tokens += output.token_ids
        self.log_probs += output.logprobs.logprobs
        if finished:
            self.finish(STOP if output.finish_reason == "stop" else LENGTH)

    def finish(self, reason: int) -> None:
        self.running, self.reason = False, reason


def sample_seed(seed: int, sample_id: int) -> int:
    """The seed of a sample's random numbers: 63 bits of BLAKE2b, a function of the run's seed and the sample alone."""
    digest = hashlib.blake2b(f"{seed}:{sample_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _completions(rows: list[_Row], version: int) -> Completions:
    lengths = torch.tensor([len(row.tokens) for row in rows], dtype=torch.int64)
    offsets = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)))
    tokens = torch.tensor([token for row in rows for token in row.tokens], dtype=torch.int64)
    log_probs = torch.tensor([value for row in rows for value in row.log_probs], dtype=torch.float32)
    reasons = torch.tensor([row.reason for row in rows], dtype=torch.int8)
    versions = Ragged(torch.full_like(tokens, version), offsets)
    return Completions(Ragged(tokens, offsets), Ragged(log_probs, offsets), reasons, version, versions)
