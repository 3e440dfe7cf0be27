"""Ring attention: keys and values travel round the group, results are merged by their log-sum-exp (arXiv 2310.01889).

Shapes: T this worker's tokens, S those of the block at hand, N query heads, K key heads, G = N / K, D head size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from siirl.device.collectives import Collectives
from siirl.training.exchange import swap_rows
from siirl_kernels.packing import PackedSequences

# scores of so many elements are in memory at a time
_SCORES = 16 * 2**20
# most queries whose scores are computed together: keys that none of them sees are left out
_QUERIES = 512


class _Visible(NamedTuple):
    """Some queries, and the keys of a block that any of them may attend to.

    Attributes:
        queries: of this worker's tokens.
        keys: int64 [S'], of the block.
        mask: bool [queries, S'], True where one may attend to the other.
    """

    queries: slice
    keys: Tensor
    mask: Tensor


class RingAttention:
    """Attention of this worker's tokens to all tokens of their sequences, shared prefixes included.

    Args:
        sequences: of the whole micro-batch.
        counts: tokens of each worker of the group.
        group: of the workers.
    """

    def __init__(self, sequences: PackedSequences, counts: list[int], group: Collectives) -> None:
        self.sequences, self.rank = sequences, group.rank
        self._counts, self._group = counts, group
        lengths = torch.tensor(sequences.lengths)
        number = torch.arange(len(lengths))
        parents = torch.tensor(sequences.parents) if sequences.parents else number
        prefixes = torch.tensor(sequences.prefixes) if sequences.prefixes else torch.zeros_like(number)
        facts = torch.stack((number, parents, prefixes)).repeat_interleave(lengths, dim=1).to(sequences.device)
        self._facts = torch.cat((facts, sequences.positions[None])).split(counts, dim=1)
        self._visible: dict[tuple[int, int], list[_Visible]] = {}

    def __call__(self, layer: int, q_TND: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> Tensor:
        return _Ring.apply(q_TND, k_TKD, v_TKD, self)

    def blocks(self, own: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Each worker's block [S, ...] in turn, and whose it is; ``own`` is this one's and the first."""
        owner, block = self.rank, own
        yield owner, block
        for _ in range(self._group.size - 1):
            block = self.pass_on(block, owner)
            owner = (owner - 1) % self._group.size
            yield owner, block

    def pass_on(self, x: Tensor, owner: int) -> Tensor:
        """Give the block of worker ``owner`` to the next worker; the block of the one before ``owner``."""
        rank, size = self.rank, self._group.size
        send, receive = [0] * size, [0] * size
        send[(rank + 1) % size] = self._counts[owner % size]
        receive[(rank - 1) % size] = self._counts[(owner - 1) % size]
        return swap_rows(x, send, receive, self._group)

    def visible(self, owner: int, heads: int) -> list[_Visible]:
        """What this worker's tokens see of a block."""
        if (owner, heads) not in self._visible:
            self._visible[owner, heads] = list(self._look(owner, heads))
        return self._visible[owner, heads]

    def _look(self, owner: int, heads: int) -> Iterator[_Visible]:
        own, theirs = self._facts[self.rank], self._facts[owner]
        keys = theirs.shape[1]
        step = min(_QUERIES, max(1, _SCORES // max(1, keys * heads)))
        for start in range(0, own.shape[1] if keys else 0, step):
            part = slice(start, min(start + step, own.shape[1]))
            sequence, parent, prefix, position = own[:, part, None]
            same = (theirs[0] == sequence) & (theirs[3] <= position)
            mask = same | ((theirs[0] == parent) & (theirs[3] < prefix))
            seen = mask.any(0).nonzero().squeeze(1)
            if len(seen):
                yield _Visible(part, seen, mask[:, seen])


class _Ring(torch.autograd.Function):
    """Forward: softmax over all blocks, built up block by block. Backward: from the log-sum-exp, a block at a time,
    while the gradients of keys and values travel on with them."""

    @staticmethod
    def forward(ctx: Any, q_TND: Tensor, k_TKD: Tensor, v_TKD: Tensor, ring: RingAttention) -> Tensor:
        out = torch.zeros_like(q_TND, dtype=torch.float32)
        log_sum_TN = torch.full(q_TND.shape[:2], -math.inf, device=q_TND.device)
        for owner, block in ring.blocks(torch.stack((k_TKD, v_TKD), 1)):
            for queries, keys, mask in ring.visible(owner, q_TND.shape[1]):
                k, v = block[keys].float().unbind(1)
                scores = _scores(q_TND[queries], k, mask)
                block_sum = scores.logsumexp(-1)
                block_out = torch.einsum("kgts,skd->tkgd", _weights(scores, block_sum), v).flatten(1, 2)
                _merge(out[queries], log_sum_TN[queries], block_out, block_sum.permute(2, 0, 1).flatten(1))
        ctx.save_for_backward(q_TND, k_TKD, v_TKD, out, log_sum_TN)
        ctx.ring = ring
        return out.to(q_TND.dtype)

    @staticmethod
    def backward(ctx: Any, grad_TND: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q_TND, k_TKD, v_TKD, out, log_sum_TN = ctx.saved_tensors
        ring: RingAttention = ctx.ring
        kv_heads, scale = k_TKD.shape[1], q_TND.shape[-1] ** -0.5
        grad_TND, dot_TN = grad_TND.float(), (grad_TND.float() * out).sum(-1)
        dq, dkv = torch.zeros_like(out), torch.zeros(len(k_TKD), 2, *k_TKD.shape[1:], device=q_TND.device)
        for turn, (owner, block) in enumerate(ring.blocks(torch.stack((k_TKD, v_TKD), 1))):
            if turn:
                dkv = ring.pass_on(dkv, owner + 1)
            for queries, keys, mask in ring.visible(owner, q_TND.shape[1]):
                k, v = block[keys].float().unbind(1)
                q, grad = (x[queries].float().unflatten(1, (kv_heads, -1)) for x in (q_TND, grad_TND))
                log_sum, dot = (x[queries].unflatten(1, (kv_heads, -1)).permute(1, 2, 0) for x in (log_sum_TN, dot_TN))
                p = _weights(_scores(q_TND[queries], k, mask), log_sum)
                ds = p * (torch.einsum("tkgd,skd->kgts", grad, v) - dot[..., None]) * scale
                dq[queries] += torch.einsum("kgts,skd->tkgd", ds, k).flatten(1, 2)
                dk, dv = torch.einsum("kgts,tkgd->skd", ds, q), torch.einsum("kgts,tkgd->skd", p, grad)
                dkv.index_add_(0, keys, torch.stack((dk, dv), 1))
        dk, dv = ring.pass_on(dkv, ring.rank + 1).unbind(1)  # one place more, and they are home
        return dq.to(q_TND.dtype), dk.to(k_TKD.dtype), dv.to(v_TKD.dtype), None


def _scores(q_TND: Tensor, k_SKD: Tensor, mask_TS: Tensor) -> Tensor:
    """Scaled scores, float32 [K, G, T, S], -inf where masked."""
    q = q_TND.float().unflatten(1, (k_SKD.shape[1], -1))
    scores = torch.einsum("tkgd,skd->kgts", q, k_SKD) * q.shape[-1] ** -0.5
    return scores.masked_fill_(~mask_TS, -math.inf)


def _weights(scores_KGTS: Tensor, log_sum_KGT: Tensor) -> Tensor:
    """exp(scores - log-sum-exp); 0 for a query that sees nothing of a block."""
    return (scores_KGTS - log_sum_KGT.masked_fill(log_sum_KGT.isneginf(), 0.0)[..., None]).exp_()


def _merge(out: Tensor, log_sum_TN: Tensor, block_out: Tensor, block_sum_TN: Tensor) -> None:
    """Bring ``out`` and ``log_sum_TN`` up to date with a block. The first block has each query's own token."""
    total = torch.logaddexp(log_sum_TN, block_sum_TN)
    out.mul_((log_sum_TN - total).exp()[..., None]).add_(block_out * (block_sum_TN - total).exp()[..., None])
    log_sum_TN.copy_(total)
