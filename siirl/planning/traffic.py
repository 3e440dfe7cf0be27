"""Bytes through a `redistribute`: which columns, how wide they travel, how many rows change place."""

from __future__ import annotations

from dataclasses import dataclass

from siirl.dag import Step
from siirl.planning.job import Job

# One value a response token (float32), by the formal names of the built-in ops; tokens are ids of the vocabulary.
_TOKENS = ("prompt_ids", "response_ids")
_PER_TOKEN = ("rollout_log_probs", "log_probs", "values", "advantages", "returns", "token_rewards")
# Bytes of one row of a dense column; `row` is the source's row as JSON.
_DENSE = {"reward": 4.0, "failed": 1 / 8, "finish_reason": 1.0, "row": 200.0}
_OTHER = 4.0

IDS = ("sample_id", "group_id", "slot")
# Integers a row of the control plane: the three ids, stratum, cost; and one for each ragged column.
_CONTROL = 5


@dataclass(frozen=True)
class Moved:
    """Traffic of one redistribution, per worker unless it says otherwise.

    Attributes:
        row: bytes of one row on its way.
        sent: bytes one worker sends to other shares, on average.
        shared: bytes one worker gets from its own share's other workers.
        control: bytes of integers that every worker gathers, of all rows of the run.
        kept: share of the tokens that stay.
        total: bytes over all workers.
        staged: bytes that a worker holds beside its batch while rows move.
    """

    row: float
    sent: float
    shared: float
    control: float
    kept: float
    total: float
    staged: float


def column_bytes(job: Job, column: str, narrow: bool = True) -> float:
    """Mean bytes of one row's column as it travels: integers in the narrowest type that holds them, or as int64."""
    formal = _formals(job.steps).get(column, column)
    if formal in _TOKENS:
        tokens = job.lengths.prompt if formal == "prompt_ids" else job.lengths.mean_response
        vocabulary = job.actor.vocab_size
        return tokens * (8 if not narrow else 1 if vocabulary <= 2**8 else 2 if vocabulary <= 2**15 else 4)
    if formal in _PER_TOKEN:
        return 4 * job.lengths.mean_response
    if formal == "router_choices":
        tokens = job.lengths.prompt + job.lengths.mean_response - 1
        size = 1 if narrow and job.actor.num_experts <= 2**8 else 2
        return size * job.actor.num_layers * job.actor.experts_per_token * tokens
    return 0.0 if column in IDS else _DENSE.get(formal, _OTHER)


def padded_bytes(job: Job, column: str) -> float:
    """Bytes of one row's column where rows are padded to the longest and tokens are int64, with a mask as wide."""
    formal = _formals(job.steps).get(column, column)
    config = job.config
    if formal in _TOKENS:
        longest = config.data.max_prompt_tokens if formal == "prompt_ids" else config.rollout.max_new_tokens
        return 2 * 8.0 * longest
    if formal in _PER_TOKEN:
        return 4.0 * config.rollout.max_new_tokens
    return 8.0 if column in IDS else max(1.0, _DENSE.get(formal, _OTHER))


def moved_bytes(job: Job, step: Step) -> Moved:
    """What a redistribution moves."""
    assert step.source is not None and step.target is not None
    row = sum(column_bytes(job, column, narrow=step.transport == "collectives") for column in step.fields)
    samples = job.config.data.prompts_per_step * job.group
    source, target = step.source, step.target
    inner_before, inner_after = (layout.workers // layout.data for layout in (source, target))
    kept = job.sampled.kept  # what goes back to its group later is what left it
    share = row * samples / target.data
    moving = share * (1 - kept)
    # a row that changes share comes once and is shared inside; one that stays is missing where its share was smaller
    missing = max(0.0, 1 - inner_before / inner_after) * share * kept
    sent = moving / inner_after
    shared = moving * (1 - 1 / inner_after) + missing
    ragged = sum(_formals(job.steps).get(c, c) in (*_TOKENS, *_PER_TOKEN, "row") for c in step.fields)
    control = 8.0 * samples * (_CONTROL + ragged)
    return Moved(row, sent, shared, control, kept, (sent + shared) * target.workers, 2 * (sent + shared))


def batch_bytes(job: Job) -> float:
    """A worker's own rows with all columns of the plan, unpacked (ids as int64)."""
    columns = {column for step in job.steps for column in step.writes.values()}
    row = sum(8.0 if c in IDS else column_bytes(job, c, narrow=False) for c in columns)
    return row * job.config.data.prompts_per_step * job.group / min(job.rollout.data, job.training.data)


def _formals(steps: tuple[Step, ...]) -> dict[str, str]:
    """The formal name under which each column is written."""
    return {column: formal for step in steps for formal, column in step.writes.items()}
