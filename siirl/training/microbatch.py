"""Mini-batches and packed micro-batches: which rows go together, and their tokens without a padding token.

Shapes: T packed input tokens, R response tokens, N rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from siirl.data.batch import Batch
from siirl.training.replay import packed_choices
from siirl_kernels.packing import PackedSequences


@dataclass(frozen=True)
class MicroBatch:
    """Rows of a batch, packed.

    A row's input is its prompt and its response but the last token, whose successor nobody asks for. Rows with the same
    prompt share its tokens.

    Attributes:
        rows: int64 [N], rows of the batch, on the host.
        tokens_T: input token ids.
        sequences: where each row begins and ends in the input.
        states_S: tokens of the input whose hidden states predict response tokens, ascending.
        state_R: which of these states predicts each response token; a prompt's last one predicts all first tokens.
        targets_R: those response tokens.
        offsets: int64 [N+1] on the host: the response tokens of each row.
        choices_TLK: the experts that rollout sent each token to; None where training's routers choose.
    """

    rows: Tensor
    tokens_T: Tensor
    sequences: PackedSequences
    states_S: Tensor
    state_R: Tensor
    targets_R: Tensor
    offsets: Tensor
    choices_TLK: Tensor | None = None


def input_lengths(batch: Batch) -> Tensor:
    """Input tokens of each row, int64 [rows]."""
    return (batch.lengths("prompt_ids") + batch.lengths("response_ids") - 1).clamp(min=1)


def split(lengths: Tensor, prompts: Tensor, prompt_lengths: Tensor, budget: int) -> list[Tensor]:
    """Split rows into micro-batches of at most ``budget`` distinct tokens, each of at least one row.

    Rows of one prompt stay together as far as they fit, so that its tokens are computed, and counted, once; beyond
    that, like lengths go together.

    Args:
        lengths: int64 [rows].
        prompts: int64 [rows], which prompt each row answers.
        prompt_lengths: int64 [rows], how many of its tokens are the prompt's.
        budget: tokens of one micro-batch.

    Returns:
        Row indices of each micro-batch, ascending within it; a function of the arguments alone.
    """
    longest: dict[int, int] = {}
    rows = list(zip(lengths.tolist(), prompts.tolist(), prompt_lengths.tolist(), range(len(lengths)), strict=True))
    for length, prompt, _, _ in rows:
        longest[prompt] = max(length, longest.get(prompt, 0))
    parts: list[list[int]] = []
    tokens, held = 0, -1
    for length, prompt, shared, row in sorted(rows, key=lambda r: (-longest[r[1]], r[1], -r[0], r[3])):
        more = length - shared if prompt == held else length
        if not parts or tokens + more > budget:
            parts.append([])
            tokens, more = 0, length
        parts[-1].append(row)
        tokens, held = tokens + more, prompt
    return [torch.tensor(sorted(part)) for part in parts]


def mini_batch_index(slots: Tensor, prompts: int, mini_batches: int) -> Tensor:
    """The mini-batch of each row, int64 [rows]: the m-th holds the m-th part of the step's global order of prompts.

    Needs no word with another worker, and does not depend on their number.

    Args:
        slots: int64 [rows], position of each row's prompt in the step's order.
        prompts: prompts of the step over all workers.
        mini_batches: updates per pass.
    """
    return slots * mini_batches // prompts


def pack(batch: Batch, rows: Tensor, device: torch.device) -> MicroBatch:
    """Pack these rows of a batch with columns ``prompt_ids`` and ``response_ids``, both ragged int64."""
    prompts, responses = batch.ragged("prompt_ids").take(rows), batch.ragged("response_ids").take(rows)
    first_row: dict[bytes, int] = {}
    pieces, parents = [], []
    for row, (prompt, response) in enumerate(zip(prompts.rows(), responses.rows(), strict=True)):
        parents.append(first_row.setdefault(prompt.numpy().tobytes(), row))
        pieces += [prompt, response[:-1]] if parents[-1] == row else [response[:-1]]
    parent, responded = torch.tensor(parents, dtype=torch.int64), responses.lengths
    prefixes = torch.where(parent < torch.arange(len(rows)), prompts.lengths, 0)
    # an empty response still leaves its prompt's last token in: a row without tokens has no place in a packed batch
    lengths = prompts.lengths - prefixes + (responded - 1).clamp(min=0)
    starts = lengths.cumsum(0) - lengths
    # the prompt's last token, perhaps the parent's, predicts the first response token, each of these the next
    within = torch.arange(int(responded.sum())) - responses.offsets[:-1].repeat_interleave(responded)
    last_prompt = (starts[parent] + prompts.lengths - 1).repeat_interleave(responded)
    own = (starts + prompts.lengths - prefixes - 1).repeat_interleave(responded) + within
    shared = (tuple(parents), tuple(prefixes.tolist())) if bool(prefixes.any()) else ()
    choices_TLK = packed_choices(batch, rows, parents)
    states, state = torch.where(within == 0, last_prompt, own).unique(return_inverse=True)
    return MicroBatch(
        rows,
        torch.cat(pieces).to(device),
        PackedSequences(tuple(lengths.tolist()), device, *shared),
        states.to(device),
        state.to(device),
        responses.values.to(device),
        responses.offsets,
        None if choices_TLK is None else choices_TLK.to(device),
    )


def dummy(device: torch.device) -> MicroBatch:
    """One token without a loss, for a worker that has to take part in a sharded pass and has no row left."""
    none = torch.empty(0, dtype=torch.int64)
    token = torch.zeros(1, dtype=torch.int64, device=device)
    empty = none.to(device)
    offsets = torch.zeros(1, dtype=torch.int64)
    return MicroBatch(none, token, PackedSequences((1,), device), empty, empty, empty, offsets)
