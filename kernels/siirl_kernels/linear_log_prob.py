"""Fused linear + log-prob + entropy in chunks of tokens.

With z = h Wᵀ / τ, p = softmax(z), H = logsumexp(z) - Σ p z:
    ∂ log p_t / ∂z = onehot(t) - p          ∂H / ∂z = -p (z - logsumexp(z) + H)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Elements of one chunk of logits: 64 MiB in float32, small beside a model, large enough for full matmul speed.
_CHUNK_ELEMENTS = 16 * 2**20
# So many chunks are kept for the backward pass; of more it computes all again.
_KEPT_CHUNKS = 2


def chunks(tokens: int, vocabulary: int) -> list[tuple[int, int]]:
    """Where the chunks of tokens begin and end."""
    size = max(1, _CHUNK_ELEMENTS // vocabulary)
    return [(start, min(start + size, tokens)) for start in range(0, tokens, size)]


def keeps(tokens: int, vocabulary: int) -> bool:
    """Whether the forward pass leaves all its chunks to the backward pass."""
    return tokens * vocabulary <= _KEPT_CHUNKS * _CHUNK_ELEMENTS


def _log_softmax(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    logits = (hidden @ weight.t()).float()
    if temperature != 1.0:
        logits /= temperature
    return torch.log_softmax(logits, dim=-1)


class LinearLogProb(torch.autograd.Function):
    """See :func:`siirl_kernels.reference.linear_log_prob`."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        tokens, vocabulary = hidden.shape[0], weight.shape[0]
        log_prob = torch.empty(tokens, dtype=torch.float32, device=hidden.device)
        entropy = torch.empty_like(log_prob)
        kept: list[Tensor] = []
        for start, end in chunks(tokens, vocabulary):
            log_p = _log_softmax(hidden[start:end], weight, temperature)
            log_prob[start:end] = log_p.gather(1, target[start:end, None]).squeeze(1)
            entropy[start:end] = -(log_p.exp() * log_p).sum(-1)
            if keeps(tokens, vocabulary):
                kept.append(log_p)
        ctx.save_for_backward(hidden, weight, target, entropy, *kept)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)
        return log_prob, entropy

    @staticmethod
    def backward(
        ctx: Any, grad_log_prob: Tensor | None, grad_entropy: Tensor | None
    ) -> tuple[Tensor, Tensor, None, None]:
        hidden, weight, target, entropy, *kept = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)  # hundreds of chunks would round away in bfloat16
        if grad_log_prob is None:
            grad_log_prob = torch.zeros_like(entropy)
        for i, (start, end) in enumerate(chunks(hidden.shape[0], weight.shape[0])):
            log_p = kept[i] if kept else _log_softmax(hidden[start:end], weight, ctx.temperature)
            grad = log_p.exp()
            g_log_prob = grad_log_prob[start:end, None]
            factor = -g_log_prob
            if grad_entropy is not None:
                factor = factor - (log_p + entropy[start:end, None]).mul_(grad_entropy[start:end, None])
            grad.mul_(factor).scatter_add_(1, target[start:end, None], g_log_prob.contiguous())
            if ctx.temperature != 1.0:
                grad /= ctx.temperature
            grad = grad.to(hidden.dtype)
            grad_hidden[start:end] = grad @ weight
            if weight.dtype == torch.float32:
                grad_weight.addmm_(grad.t(), hidden[start:end])
            else:
                grad_weight += grad.t() @ hidden[start:end]
        return grad_hidden, grad_weight.to(weight.dtype), None, None
