"""Groups that are carried: what other workers held is taken over whole, and the oldest groups go first."""

from __future__ import annotations

import torch

from siirl.data.batch import Batch, Ragged
from siirl.device.collectives import Collectives
from siirl.rollout.contract import STOP, UNFINISHED, Completions
from siirl.rollout.partial import CarriedGroups

GROUP = 2


def prompts(*groups: int) -> Batch:
    return Batch({"sample_id": torch.tensor(groups) * 2**20, "slot": torch.arange(len(groups))})


def completions(reasons: list[int], first: int) -> Completions:
    """Sample i of the call has the token first + i, drawn by version 0."""
    tokens = Ragged.from_lists([[first + i] for i in range(len(reasons))], torch.int64)
    logs = Ragged(tokens.values.float(), tokens.offsets)
    versions = Ragged(torch.zeros_like(tokens.values), tokens.offsets)
    return Completions(tokens, logs, torch.tensor(reasons, dtype=torch.int8), 0, versions)


def test_a_state_goes_to_another_number_of_workers_and_the_oldest_groups_first() -> None:
    workers = [CarriedGroups(2, 4, GROUP, rank, 2) for rank in range(2)]
    # each ends a step with one group of three; group g has the tokens 10 g and 10 g + 1
    for worker, groups in zip(workers, ([1, 4, 5], [0, 2, 3]), strict=True):
        tokens = torch.tensor([10 * g + i for g in groups for i in range(GROUP)])
        done = completions([STOP, STOP] + [UNFINISHED] * 4, 0)
        done = Completions(
            Ragged(tokens, done.response_ids.offsets), done.log_probs, done.finish_reason, 0, done.versions
        )
        step, _ = worker.split(prompts(*groups), done, policy_version=7)
        assert (step.dense("sample_id") >> 20).tolist() == groups[:1]
    alone = CarriedGroups(2, 4, GROUP, 0, 1)
    alone.restore([worker.state() for worker in workers], Collectives.single())
    assert (alone.prompts_held.dense("sample_id") >> 20).tolist() == [2, 3, 4, 5]
    begun = alone.begun(GROUP)
    assert [list(b.response_ids) for b in begun[:-GROUP] if b] == [[20], [21], [30], [31], [40], [41], [50], [51]]
    assert begun[-GROUP:] == [None, None]
    assert alone.next_prompts(Collectives.single()) == 2
    step, samples = alone.split(prompts(9), completions([STOP] * 10, 0), policy_version=8)
    assert (step.dense("sample_id") >> 20).tolist() == [2, 3] and step.dense("slot").tolist() == [0, 1]
    assert samples.dense("policy_version").tolist() == [7] * 4  # of their first tokens
