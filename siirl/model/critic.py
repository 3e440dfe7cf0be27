"""The critic: a decoder with a scalar head."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from siirl.model.decoder import Attention, Decoder, local
from siirl.model.fallback import TransformersDecoder


class ValueModel(nn.Module):
    """Values of the states after each token. The head begins at zero, and so do all values."""

    def __init__(self, decoder: Decoder | TransformersDecoder) -> None:
        """``decoder`` becomes part of the critic; an output projection of its own is dropped."""
        super().__init__()
        self.config = decoder.config
        self.decoder = decoder
        if isinstance(decoder, Decoder) and not decoder.config.tie_embeddings:
            del decoder.lm_head
        self.value_head = nn.Linear(decoder.config.hidden_size, 1, bias=False)
        nn.init.zeros_(self.value_head.weight)

    def forward(
        self, tokens_T: Tensor, positions_T: Tensor, attention: Attention, keep_S: Tensor | None = None
    ) -> Tensor:
        """Values, float32 [T] or [S]; arguments as of :meth:`siirl.model.decoder.Decoder.forward`."""
        hidden_TH = self.decoder(tokens_T, positions_T, attention, keep_S)
        # A product and a sum rather than a matrix product, which autocast would round to bfloat16.
        return (hidden_TH.float() * local(self.value_head.weight).float()).sum(-1, dtype=torch.float32)
