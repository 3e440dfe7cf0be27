"""Tensor parallel: each worker of a group holds and computes a part of every layer (arXiv 1909.08053).

Queries, keys, values, gate and up are cut by output, so that a worker has whole heads; the output and down projections
are cut by input, and their partial results are summed. The vocabulary is cut where it divides, else it is held whole.
Parameters are DTensors, so that sharding, checkpoints and weight sync see what they are parts of; kernels compute with
plain local tensors. With sequence parallel (arXiv 2205.05198) the tokens between these layers are cut too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from siirl.device.collectives import Collectives
from siirl.errors import RequestError
from siirl.model.critic import ValueModel
from siirl.model.decoder import MLP, Block, Decoder, Linear, RMSNorm, local
from siirl.training.exchange import copy, gather, reduce, scatter, shares
from siirl.training.sharding import own_grad, sum_flat
from siirl_kernels import kernels

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class TensorParallel:
    """What a module was cut into.

    Attributes:
        collectives: of the group.
        partial: names of parameters that all workers hold whole and whose gradients are partial: to be summed.
        vocabulary: whether embedding and head are cut by vocabulary.
    """

    collectives: Collectives
    partial: tuple[str, ...] = ()
    vocabulary: bool = False


class _Tokens:
    """The tokens of the pass under way, where layers hold a part of them each."""

    counts: list[int]


def parallelize(module: nn.Module, group: Collectives, devices: DeviceMesh | None, sequence: bool) -> TensorParallel:
    """Cut the decoder within ``module`` over a tensor group, in place.

    Args:
        module: holds a :class:`Decoder`, the same weights on all workers.
        group: of tensor parallel workers.
        devices: the same, as PyTorch sees it.
        sequence: cut the tokens between attention and MLP too.

    Raises:
        RequestError: this model's layers cannot be cut.
    """
    if group.size == 1:
        return TensorParallel(group)
    assert devices is not None
    decoder = next((m for m in module.modules() if isinstance(m, Decoder)), None)
    critic = any(isinstance(m, ValueModel) for m in module.modules())
    if decoder is None or not all(map(_plain, decoder.blocks)):
        raise RequestError(
            f"training.parallel.tensor is {group.size}, but this model's layers cannot be cut; "
            "set training.parallel.tensor=1"
        )
    vocabulary = decoder.config.vocab_size % group.size == 0
    dims = _dimensions(module, decoder, vocabulary)
    partial = tuple(name for name, p in module.named_parameters() if id(p) in _partial(decoder, sequence))
    distribute(module, dims, group, devices)
    hooks = _Hooks(group, sequence)
    for block in decoder.blocks:
        hooks.cut(block)
    hooks.ends(decoder, vocabulary, vocabulary_head=vocabulary and not critic)
    return TensorParallel(group, partial, vocabulary)


def _plain(block: Block) -> bool:
    """Whether a layer has no matrices but those that are known here."""
    parts = [block.mlp, *block.mlp.children(), *block.self_attn.children()]
    return all(type(part) in (MLP, Linear, RMSNorm, nn.Identity) for part in parts)


def _dimensions(module: nn.Module, decoder: Decoder, vocabulary: bool) -> dict[int, int | None]:
    """The dimension that each parameter is cut along, by the parameter's id; None: not cut."""
    dims: dict[int, int | None] = {id(p): None for p in module.parameters()}
    for block in decoder.blocks:
        attention, mlp = block.self_attn, _mlp(block)
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
            dims |= {id(p): 0 for p in linear.parameters()}
        dims |= {id(linear.weight): 1 for linear in (attention.o_proj, mlp.down_proj)}
    if vocabulary:
        dims[id(decoder.model.embed_tokens.weight)] = 0
        if hasattr(decoder, "lm_head"):
            dims[id(decoder.lm_head.weight)] = 0
    return dims


def _mlp(block: Block) -> MLP:
    return cast(MLP, block.mlp)


def _partial(decoder: Decoder, sequence: bool) -> set[int]:
    """Parameters held whole that see a part of the heads, or of the tokens."""
    modules: list[nn.Module] = []
    biases: list[Tensor | None] = []
    for block in decoder.blocks:
        modules += [block.self_attn.q_norm, block.self_attn.k_norm]
        if sequence:
            modules += [block.input_layernorm, block.post_attention_layernorm]
            biases += [block.self_attn.o_proj.bias, _mlp(block).down_proj.bias]
    if sequence:
        modules.append(decoder.model.norm)
    return {id(p) for module in modules for p in module.parameters()} | {id(b) for b in biases if b is not None}


def distribute(module: nn.Module, dims: dict[int, int | None], group: Collectives, devices: DeviceMesh) -> None:
    """Make DTensors of a module's parameters, cut along the dimensions given by their ids; None: held whole."""
    from torch.distributed.tensor import DTensor, Replicate, Shard  # a second to import

    for owner in module.modules():
        for name, parameter in list(owner._parameters.items()):
            if parameter is None:
                continue
            dim, own = dims[id(parameter)], parameter.detach()
            if dim is not None:
                own = own.chunk(group.size, dim)[group.rank].clone()
            placement = Replicate() if dim is None else Shard(dim)
            held = DTensor.from_local(own, devices, [placement], run_check=False)
            owner._parameters[name] = nn.Parameter(held, requires_grad=parameter.requires_grad)


class _Hooks:
    """What the layers do beside computing with their own part."""

    def __init__(self, group: Collectives, sequence: bool) -> None:
        self._group, self._sequence, self._tokens = group, sequence, _Tokens()

    def cut(self, block: Block) -> None:
        for part, last in ((block.self_attn, block.self_attn.o_proj), (block.mlp, _mlp(block).down_proj)):
            part.register_forward_pre_hook(lambda _, args: (self._enter(args[0]), *args[1:]))
            _compute(last, self._row_linear(last))

    def ends(self, decoder: Decoder, vocabulary: bool, vocabulary_head: bool) -> None:
        embedding = decoder.model.embed_tokens
        if vocabulary:
            _compute(embedding, self._vocabulary_embedding(embedding))
        elif self._sequence:
            embedding.register_forward_hook(lambda _, args, x: self._begin(args[0], x, partial=False))
        if self._sequence or vocabulary_head:
            decoder.model.norm.register_forward_hook(lambda _, args, x: self._enter(x, partial=vocabulary_head))

    def _enter(self, x: Tensor, partial: bool = True) -> Tensor:
        """Into layers that compute all tokens with a part of the weights."""
        if self._sequence:
            return gather(x, self._tokens.counts, self._group, partial=partial)
        return copy(x, self._group)

    def _leave(self, x: Tensor) -> Tensor:
        """Out of them: their results are partial."""
        if self._sequence:
            return scatter(x, self._tokens.counts, self._group, partial=True)
        return reduce(x, self._group)

    def _begin(self, tokens_T: Tensor, x: Tensor, partial: bool) -> Tensor:
        self._tokens.counts = shares(len(tokens_T), self._group.size)
        if self._sequence:
            return scatter(x, self._tokens.counts, self._group, partial=partial)
        return reduce(x, self._group)

    def _row_linear(self, linear: Linear) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            out = self._leave(kernels.linear(x, local(linear.weight).to(x.dtype), None))
            return out if linear.bias is None else out + local(linear.bias).to(out.dtype)

        return forward

    def _vocabulary_embedding(self, embedding: nn.Embedding) -> Callable[[Tensor], Tensor]:
        def forward(tokens_T: Tensor) -> Tensor:
            weight = local(embedding.weight)
            rows, own = own_tokens(tokens_T, len(weight), self._group.rank)
            return self._begin(tokens_T, nn.functional.embedding(rows, weight) * own[:, None], partial=True)

        return forward


def _compute(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> None:
    module.forward = forward


def own_tokens(tokens: Tensor, size: int, rank: int) -> tuple[Tensor, Tensor]:
    """Rows of tokens within a worker's part of the vocabulary, 0 for others'; and which are its own, bool."""
    rows = tokens - rank * size
    own = (rows >= 0) & (rows < size)
    return torch.where(own, rows, 0), own


def vocabulary_log_prob(
    hidden_TH: Tensor, weight_VH: Tensor, target_T: Tensor, temperature: float, group: Collectives
) -> tuple[Tensor, Tensor]:
    """As `kernels.linear_log_prob`, with a part of the vocabulary on each worker of a group.

    With z_t the target's logit, l_r the log-sum-exp and H_r the entropy of part r: l = log Σ exp l_r,
    log p_t = z_t - l and H = l - Σ exp(l_r - l) (l_r - H_r). Only numbers per token travel.

    Args:
        hidden_TH: the same on all workers; its gradient is partial.
        weight_VH: this worker's rows of the projection, parts in rank order, all of one size.
        target_T: ids of the whole vocabulary.
        temperature: divides the logits.
        group: of the tensor parallel workers.

    Returns:
        log-probs and entropies, float32 [T], the same on all workers.
    """
    rows, own = own_tokens(target_T, len(weight_VH), group.rank)
    part_log_prob, part_entropy = kernels.linear_log_prob(hidden_TH, weight_VH, rows, temperature)
    logit = (hidden_TH.float() * weight_VH[rows].float()).sum(-1) / temperature
    part = logit - part_log_prob
    highest = group.all_reduce(part.detach().clone(), "max")
    share = (part - highest).exp()
    own_sums = torch.stack((share, torch.where(own, logit, 0.0), share * (part - part_entropy)))
    total, target, weighted = reduce(own_sums, group)
    log_sum = highest + total.log()
    return target - log_sum, log_sum - weighted / total


def vocabulary_argmax(hidden_TH: Tensor, weight_VH: Tensor, group: Collectives) -> Tensor:
    """The likeliest tokens, int64 [T], the first of equals; arguments as of :func:`vocabulary_log_prob`."""
    best, token = nn.functional.linear(hidden_TH, weight_VH).float().max(-1)
    highest = group.all_reduce(best.clone(), "max")
    token = torch.where(best == highest, token + group.rank * len(weight_VH), torch.iinfo(torch.int64).max)
    return group.all_reduce(token, "min")


def sum_partial(module: nn.Module, parallel: TensorParallel) -> None:
    """Sum the gradients that are partial over the tensor group: once an update, before they are clipped."""
    named = dict(module.named_parameters())
    held = [named[name] for name in parallel.partial]
    sum_flat([own_grad(parameter) for parameter in held if parameter.grad is not None], parallel.collectives)
