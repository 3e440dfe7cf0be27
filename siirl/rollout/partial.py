"""Partial rollout: a step ends when it has enough whole groups, and the others go on in the next one.

The longest responses of a step would hold up all others (APRIL, arXiv 2509.18521; Kimi k1.5, arXiv 2501.12599, section
2.6). So each worker has more prompts in flight than its part of a step, ends the step with the groups that are whole
first, and carries the rest over: prompts, tokens, log-probs, and for each token the version of the weights that drew
it. A carried response goes on from where it stands, by its own random numbers, under the new weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from siirl.data.batch import Batch
from siirl.rollout.contract import UNFINISHED, Begun, Completions

if TYPE_CHECKING:
    from siirl.device.collectives import Collectives

_PROMPTS, _SAMPLES = "prompts.", "samples."


class CarriedGroups:
    """The groups of this worker that are begun and not trained on.

    Args:
        wanted: groups of a step over all workers.
        extra: groups that all workers have in flight beside those of a step.
        group: responses of a group.
        rank: of this worker.
        workers: that generate.
    """

    def __init__(self, wanted: int, extra: int, group: int, rank: int, workers: int) -> None:
        self._wanted, self._extra, self._group = wanted, extra, group
        self._first, self._stop = (wanted * r // workers for r in (rank, rank + 1))
        self.prompts_held = Batch({})
        self.samples_held = Batch({})

    def next_prompts(self, collectives: Collectives) -> int:
        """Prompts that the next step begins, over all workers; every worker calls it."""
        own = torch.tensor([len(self.prompts_held)], dtype=torch.int64)
        carried = int(torch.cat(collectives.all_gather_ints(own)).sum())
        return self._wanted + max(0, self._extra - carried)

    @property
    def enough(self) -> int:
        """Groups of this worker's part of a step."""
        return self._stop - self._first

    def begin(self) -> None:
        """Begin a step."""

    def begun(self, new: int) -> list[Begun | None]:
        """What the engine goes on from: the samples carried, then None for each of ``new`` samples."""
        if not len(self.samples_held):
            return [None] * new
        rows = [self.samples_held.ragged(name).rows() for name in ("response_ids", "log_probs", "versions")]
        reasons = self.samples_held.dense("finish_reason").tolist()
        held = [
            Begun(ids.tolist(), log_probs.tolist(), versions.tolist(), reason)
            for ids, log_probs, versions, reason in zip(*rows, reasons, strict=True)
        ]
        return [*held, *[None] * new]

    def split(self, prompts: Batch, done: Completions, policy_version: int) -> tuple[Batch, Batch]:
        """Take the oldest whole groups for the step and carry the others.

        Args:
            prompts: the new prompts of the step, one row each.
            done: of the groups carried and then of these.
            policy_version: of the weights that drew the tokens drawn last.

        Returns:
            The step's prompts with their slots, and its samples: response_ids, log_probs, versions, finish_reason and
            policy_version, the one of a sample's first token.
        """
        flying = Batch.concat([self.prompts_held, prompts]) if len(self.prompts_held) else prompts
        samples = Batch(
            {
                "response_ids": done.response_ids,
                "log_probs": done.log_probs,
                "versions": done.versions,
                "finish_reason": done.finish_reason,
                "policy_version": self._policy_versions(len(done.finish_reason), policy_version),
            }
        )
        whole = (done.finish_reason != UNFINISHED).view(-1, self._group).all(1).nonzero().squeeze(1)
        chosen = whole[: self.enough]
        rest = torch.ones(len(flying), dtype=torch.bool).index_fill(0, chosen, False).nonzero().squeeze(1)
        self.prompts_held, self.samples_held = flying.take(rest), samples.take(self._samples_of(rest))
        slots = self._first + torch.arange(len(chosen))
        return flying.take(chosen).with_columns(slot=slots), samples.take(self._samples_of(chosen))

    def state(self) -> dict[str, Tensor]:
        """What is carried here as tensors by name, for a checkpoint; none where nothing is."""
        if not len(self.prompts_held):
            return {}
        parts = ((_PROMPTS, self.prompts_held), (_SAMPLES, self.samples_held))
        return {prefix + name: tensor for prefix, held in parts for name, tensor in held.to_tensors().items()}

    def restore(self, states: Sequence[Mapping[str, Tensor]], collectives: Collectives) -> None:
        """Carry what some workers' states hold; every worker calls it, and each state goes to one of them."""

        def held(prefix: str) -> Batch:
            parts = [{k.removeprefix(prefix): t for k, t in s.items() if k.startswith(prefix)} for s in states if s]
            return Batch.concat([Batch.from_tensors(part) for part in parts]) if parts else Batch({})

        prompts, samples = held(_PROMPTS), held(_SAMPLES)
        if len(prompts):
            oldest = prompts.dense("sample_id").argsort()
            prompts, samples = prompts.take(oldest), samples.take(self._samples_of(oldest))
        self.prompts_held, self.samples_held = prompts, samples

    def _samples_of(self, groups: Tensor) -> Tensor:
        return (groups[:, None] * self._group + torch.arange(self._group)).flatten()

    def _policy_versions(self, count: int, newest: int) -> Tensor:
        """Of the samples carried the version that began them, of the others the newest."""
        versions = torch.full((count,), newest, dtype=torch.int64)
        if len(self.samples_held):
            begun = self.samples_held.lengths("response_ids") > 0
            held = torch.where(begun, self.samples_held.dense("policy_version"), newest)
            versions[: len(held)] = held
        return versions
