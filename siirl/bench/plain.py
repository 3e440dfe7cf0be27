"""The references of rollout, update and train: the decoder's work in plain PyTorch, as a script would write it.

Sequences of one length, no kernel table, no packing, nothing shared between the responses to a prompt: each computes
its prompt again, the cache grows by concatenation, and the logits of all tokens are in memory at once.

Shapes: B sequences, L tokens of each, H hidden, N query heads, K key/value heads, D head size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from siirl.device.collectives import Collectives
from siirl.model.decoder import Decoder, rotary_frequencies

Cache = list[tuple[Tensor, Tensor]]


class PlainDecoder:
    """A Qwen3 decoder of ``torch.nn.functional``, with copies of a :class:`Decoder`'s weights."""

    def __init__(self, decoder: Decoder) -> None:
        self.config = decoder.config
        assert self.config.family == "qwen3" and self.config.tie_embeddings and self.config.rope_scaling is None
        self.weights = {
            name: weight.detach().clone().requires_grad_() for name, weight in decoder.model.named_parameters()
        }
        self._frequencies = rotary_frequencies(self.config).to(self.weights["norm.weight"].device)

    def __call__(self, tokens_BL: Tensor, cache: Cache | None = None) -> Tensor:
        """Logits [B, L, V] of the tokens behind those in ``cache``, which grows by them."""
        start = cache[0][0].shape[2] if cache else 0
        positions = torch.arange(start, start + tokens_BL.shape[1], device=tokens_BL.device)
        angles = torch.outer(positions.float(), self._frequencies).repeat(1, 2)
        rotary = angles.cos(), angles.sin()
        x_BLH = F.embedding(tokens_BL, self.weights["embed_tokens.weight"])
        for layer in range(self.config.num_layers):
            x_BLH = x_BLH + self._attention(layer, self._norm(x_BLH, f"layers.{layer}.input_layernorm"), rotary, cache)
            x_BLH = x_BLH + self._mlp(layer, self._norm(x_BLH, f"layers.{layer}.post_attention_layernorm"))
        return F.linear(self._norm(x_BLH, "norm"), self.weights["embed_tokens.weight"])

    def _attention(self, layer: int, x_BLH: Tensor, rotary: tuple[Tensor, Tensor], cache: Cache | None) -> Tensor:
        name = f"layers.{layer}.self_attn"
        q, k, v = (
            F.linear(x_BLH, self.weights[f"{name}.{part}_proj.weight"]).unflatten(-1, (-1, self.config.head_dim))
            for part in "qkv"
        )
        q_BNLD = _rotate(self._norm(q, f"{name}.q_norm").transpose(1, 2), *rotary)
        k_BKLD = _rotate(self._norm(k, f"{name}.k_norm").transpose(1, 2), *rotary)
        v_BKLD = v.transpose(1, 2)
        if cache is not None:
            if layer < len(cache):
                k_BKLD, v_BKLD = (torch.cat(pair, 2) for pair in zip(cache[layer], (k_BKLD, v_BKLD), strict=True))
                cache[layer] = k_BKLD, v_BKLD
            else:
                cache.append((k_BKLD, v_BKLD))
        whole = q_BNLD.shape[2] == k_BKLD.shape[2]
        out = F.scaled_dot_product_attention(q_BNLD, k_BKLD, v_BKLD, is_causal=whole, enable_gqa=True)
        return F.linear(out.transpose(1, 2).flatten(2), self.weights[f"{name}.o_proj.weight"])

    def _mlp(self, layer: int, x_BLH: Tensor) -> Tensor:
        gate, up, down = (self.weights[f"layers.{layer}.mlp.{part}_proj.weight"] for part in ("gate", "up", "down"))
        return F.linear(F.silu(F.linear(x_BLH, gate)) * F.linear(x_BLH, up), down)

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weights[f"{name}.weight"], self.config.rms_norm_eps)


def _rotate(x_BNLD: Tensor, cos_LD: Tensor, sin_LD: Tensor) -> Tensor:
    first, second = x_BNLD.chunk(2, dim=-1)
    return x_BNLD * cos_LD + torch.cat((-second, first), dim=-1) * sin_LD


@torch.no_grad()
def generate(model: PlainDecoder, prompts_BL: Tensor, new_tokens: int, forbidden: int, greedy: bool = False) -> Tensor:
    """Draw ``new_tokens`` for each prompt at temperature 1, never ``forbidden``; tokens [B, L + new_tokens]."""
    cache: Cache = []
    tokens_BL = prompts_BL
    logits_BV = model(prompts_BL, cache)[:, -1]
    for _ in range(new_tokens):
        logits_BV[:, forbidden] = -torch.inf
        drawn = logits_BV.argmax(-1, keepdim=True) if greedy else torch.multinomial(logits_BV.softmax(-1), 1)
        tokens_BL = torch.cat((tokens_BL, drawn), 1)
        if tokens_BL.shape[1] < prompts_BL.shape[1] + new_tokens:
            logits_BV = model(drawn, cache)[:, -1]
    return tokens_BL


@dataclass
class PlainTrainer:
    """PPO's clipped loss (arXiv 1707.06347) over all response tokens alike, gradient clipping at 1, AdamW."""

    model: PlainDecoder
    lr: float
    collectives: Collectives

    def __post_init__(self) -> None:
        parameters = list(self.model.weights.values())
        self._parameters = parameters
        on_host = parameters[0].device.type == "cpu"  # where siirl fuses it too
        self._optimizer = torch.optim.AdamW(parameters, lr=self.lr, weight_decay=0.0, fused=on_host)

    def log_probs(self, tokens_BL: Tensor, prompt: int) -> Tensor:
        """Log-probs [B, L - prompt] of the tokens behind the prompt's."""
        log_p_BLV = self.model(tokens_BL[:, :-1])[:, prompt - 1 :].log_softmax(-1)
        return log_p_BLV.gather(-1, tokens_BL[:, prompt:, None]).squeeze(-1)

    def update(self, tokens_BL: Tensor, prompt: int, lengths_B: Tensor, old: Tensor, advantages_B: Tensor) -> float:
        """One update; responses end after ``lengths_B`` tokens, what stands behind is padding. Returns the loss.

        Over several workers the loss is the mean of theirs: each has as many tokens.
        """
        log_probs = self.log_probs(tokens_BL, prompt)
        counted = torch.arange(log_probs.shape[1], device=log_probs.device) < lengths_B[:, None]
        ratio = (log_probs - old).exp()
        gain = advantages_B[:, None] * ratio
        clipped = advantages_B[:, None] * ratio.clamp(0.8, 1.2)
        loss = -(torch.minimum(gain, clipped) * counted).sum() / counted.sum()
        loss.backward()
        for parameter in self._parameters:
            assert parameter.grad is not None
            self.collectives.all_reduce(parameter.grad, "mean")
        torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return loss.item()
