"""Router replay: training sends each token to the experts that rollout sent it to.

Rollout and training compute with other kernels and dtypes, so their routers may choose differently; the choices of
rollout are replayed, while the weights of the chosen experts are of training's own router, with their gradient (R3,
arXiv 2510.11370).
"""

from __future__ import annotations

import torch
from torch import Tensor

from siirl.data.batch import Batch
from siirl.errors import SiirlError
from siirl.model.config import DecoderConfig
from siirl.model.experts import UNKNOWN

COLUMN = "router_choices"


def check_choices(batch: Batch, config: DecoderConfig) -> None:
    """Refuse choices that are not of these rows and this model.

    Raises:
        SiirlError: it says what does not fit.
    """
    column = batch.ragged(COLUMN)
    expected = batch.lengths("prompt_ids") + (batch.lengths("response_ids") - 1).clamp(min=0)
    if wrong := (column.lengths != expected).nonzero().flatten().tolist():
        row = wrong[0]
        raise SiirlError(
            f"the routers' choices of row {row} are of {int(column.lengths[row])} tokens, and it has "
            f"{int(expected[row])} as input"
        )
    shape = len(config.sparse_layers), config.num_experts_per_tok
    if tuple(column.values.shape[1:]) != shape:
        raise SiirlError(
            f"the routers' choices are [layers, experts of a token] = {list(column.values.shape[1:])}, and the model "
            f"has {list(shape)}"
        )
    if len(column.values) and not UNKNOWN <= int(column.values.min()) <= int(column.values.max()) < config.num_experts:
        raise SiirlError(f"the routers chose an expert that is none of the model's {config.num_experts}")


def packed_choices(batch: Batch, rows: Tensor, parents: list[int]) -> Tensor | None:
    """Choices of the tokens of packed rows, [T, L, K]; None where the batch has none.

    Args:
        rows: of the batch.
        parents: for each of them the one, by its place in ``rows``, whose copy of the prompt is packed.
    """
    if COLUMN not in batch:
        return None
    prompts = batch.lengths("prompt_ids")[rows].tolist()
    choices = batch.ragged(COLUMN).take(rows).rows()
    own = [
        row if parent == i else row[prompt:]
        for i, (row, prompt, parent) in enumerate(zip(choices, prompts, parents, strict=True))
    ]
    return torch.cat(own)
