"""Architectures that the decoder does not know, run by `transformers` behind the decoder's interface.

Shapes: T packed tokens, B sequences, L longest sequence, H hidden, V vocabulary.
"""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedConfig

from siirl.errors import RequestError
from siirl.model.decoder import Attention, Decoder, PackedAttention
from siirl.model.families import merge_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

# Logits are compared where they reach this size, so that a soft cap or a scale cannot hide.
_PROBE_LOGIT = 100.0


@dataclass(frozen=True)
class FallbackConfig:
    """What callers need to know of a model that `transformers` runs; the names are those of ``DecoderConfig``."""

    family: str
    vocab_size: int
    hidden_size: int
    max_positions: int
    initializer_range: float
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None


class TransformersDecoder(nn.Module):
    """A causal language model of `transformers` with the interface of :class:`siirl.model.decoder.Decoder`.

    Packed sequences are padded to a rectangle inside. Dropout stays off in training, so log-probs of training and
    of rollout agree.
    """

    supports_cache = False

    def __init__(self, inner: PreTrainedModel, eos_token_ids: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.inner = inner.eval()
        self.config = _config(inner.config, eos_token_ids)

    def forward(
        self, tokens_T: Tensor, positions_T: Tensor, attention: Attention, keep_S: Tensor | None = None
    ) -> Tensor:
        """Hidden states after the final norm, [T, H], or [S, H] of the tokens ``keep_S``.

        ``positions_T`` must count from 0 in each sequence.

        ``attention`` must be a :class:`PackedAttention`, whose sequences are used and whose kernel is not.
        """
        assert isinstance(attention, PackedAttention), "a model run by transformers has no cache"
        lengths = attention.sequences.lengths
        tokens_BL = pad_sequence(tokens_T.split(lengths), batch_first=True)
        lengths_B = torch.tensor(lengths, device=tokens_T.device)
        real_BL = torch.arange(tokens_BL.shape[1], device=tokens_T.device) < lengths_B[:, None]
        output = self.inner.base_model(input_ids=tokens_BL, attention_mask=real_BL.long(), use_cache=False)
        hidden_TH = output.last_hidden_state[real_BL]
        return hidden_TH if keep_S is None else hidden_TH[keep_S]

    @property
    def head_weight(self) -> Tensor:
        """The output projection, [V, H]."""
        return self.inner.get_output_embeddings().weight

    def logits(self, hidden_TH: Tensor) -> Tensor:
        """Logits [T, V]."""
        return hidden_TH @ self.head_weight.t()

    def train(self, mode: bool = True) -> TransformersDecoder:
        super().train(mode)
        self.inner.eval()
        return self


def load_fallback(
    directory: Path,
    where: str,
    reason: str,
    eos_token_ids: tuple[int, ...],
    *,
    dtype: torch.dtype,
    trust_remote_code: bool,
) -> TransformersDecoder:
    """Load a Hugging Face directory through `transformers`, and say what is lost.

    Raises:
        RequestError: `transformers` cannot load it, or its logits are not hidden · head_weightᵀ.
    """
    from transformers import AutoModelForCausalLM  # a second to import, and seldom needed

    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        line = str(error).strip().partition("\n")[0]
        raise RequestError(f"{where}: {reason}, and transformers cannot load it as a language model ({line})") from None
    inner, info = loaded
    missing = sorted(info["missing_keys"])
    if missing:  # transformers would go on with random ones
        raise RequestError(f"{where} lacks {len(missing)} weights of its architecture, the first is {missing[0]}")
    model = TransformersDecoder(inner, eos_token_ids)
    _check_head(model, where)
    message = (
        f"{where}: {reason}, so transformers runs it: sequences are padded instead of packed, kernels of siirl are "
        "not used, dropout stays off, and generation by the built-in engine has no cache"
    )
    logger.warning(message)
    warnings.warn(message, stacklevel=2)
    return model


@torch.no_grad()
def _check_head(model: TransformersDecoder, where: str) -> None:
    """Refuse a model whose logits have a bias, a scale or a cap that hidden · head_weightᵀ cannot express."""
    refusal = RequestError(f"{where}: its logits are more than hidden states times a matrix, which is not supported")
    inner, head = model.inner, model.inner.get_output_embeddings()
    if inner.base_model is inner or not isinstance(head, nn.Linear) or getattr(head, "bias", None) is not None:
        raise refusal
    seen: list[Tensor] = []

    def enlarge(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        seen.append(inputs[0])
        factor = _PROBE_LOGIT / (inputs[0] @ head.weight.t()).abs().max().clamp(min=1e-6)
        seen.append(inputs[0] * factor)
        return (seen[1],)

    tokens = torch.arange(8)[None] % model.config.vocab_size
    hidden = inner.base_model(input_ids=tokens, use_cache=False).last_hidden_state
    handle = head.register_forward_pre_hook(enlarge)
    logits = inner(input_ids=tokens, use_cache=False).logits
    handle.remove()
    tolerance = 0.02 if hidden.dtype != torch.float32 else 1e-4
    plain = len(seen) == 2 and torch.allclose(seen[0], hidden, rtol=tolerance, atol=tolerance)
    if not plain or not torch.allclose(logits.float(), (seen[1] @ head.weight.t()).float(), rtol=tolerance, atol=0.1):
        raise refusal


def _config(hf: PreTrainedConfig, eos_token_ids: tuple[int, ...]) -> FallbackConfig:
    text = hf.get_text_config()
    return FallbackConfig(
        family=hf.model_type,
        vocab_size=text.vocab_size,
        hidden_size=text.hidden_size,
        max_positions=getattr(text, "max_position_embeddings", None) or 2**31,
        initializer_range=getattr(text, "initializer_range", 0.02),
        bos_token_id=text.bos_token_id,
        eos_token_ids=merge_ids(eos_token_ids, text.eos_token_id),
        pad_token_id=text.pad_token_id,
    )


# What a rollout or training engine can run.
AnyDecoder = Decoder | TransformersDecoder
