"""How the losses of tokens become the loss of a step, whatever the split into micro-batches and workers."""

from __future__ import annotations

import torch
from torch import Tensor

from siirl.errors import RequestError, did_you_mean


def token_weights(
    mode: str, lengths_N: Tensor, valid_N: Tensor, *, global_tokens: int, global_sequences: int, max_length: int
) -> Tensor:
    """Return float32 [T], the weight of each response token of these rows in the loss of the mini-batch.

    The sum of weights · losses over all micro-batches and workers is the loss, and its gradients add up likewise; there
    is nothing more to divide by. A token of response i, of the global batch of `global_sequences` responses, weighs

        token-mean                 1 / global_tokens                      (DAPO, arXiv 2503.14476)
        seq-mean-token-sum         1 / global_sequences
        seq-mean-token-mean        1 / (global_sequences · length_i)      (GRPO, arXiv 2402.03300)
        seq-mean-token-sum-norm    1 / (global_sequences · max_length)    (Dr.GRPO, arXiv 2503.20783)

    and 0 where the row is not valid.

    Args:
        mode: a key of the table; RequestError otherwise.
        lengths_N: int64, response tokens of each row here; 0 is allowed.
        valid_N: bool.
        global_tokens, global_sequences: response tokens and responses of the valid rows of all workers; an empty
            response is a sequence too. With no valid row anywhere both are 0, and so are all weights.
        max_length: a constant of the run, the longest response it allows (``rollout.max_new_tokens``).
    """
    sequences_N = torch.full_like(lengths_N, global_sequences)
    divisors = {
        "token-mean": torch.full_like(lengths_N, global_tokens),
        "seq-mean-token-sum": sequences_N,
        "seq-mean-token-mean": sequences_N * lengths_N,
        "seq-mean-token-sum-norm": sequences_N * max_length,
    }
    if mode not in divisors:
        hint = did_you_mean(mode, divisors) or f"; known: {', '.join(divisors)}"
        raise RequestError(f"algorithm.loss_agg: there is no '{mode}'{hint}")
    weight_N = torch.where(valid_N, divisors[mode].double().reciprocal(), 0.0)
    return torch.repeat_interleave(weight_N.float(), lengths_N)
