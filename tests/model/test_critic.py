"""The critic: zero at first, one value a token, learning through the whole decoder."""

from __future__ import annotations

import pytest
import torch

from siirl.model.critic import ValueModel
from siirl.model.decoder import Decoder, PackedAttention
from siirl.model.load import load_model
from siirl_kernels.packing import PackedSequences


def packed(*lengths: int) -> PackedSequences:
    return PackedSequences(lengths, torch.device("cpu"))


@pytest.fixture
def decoder() -> Decoder:
    model = load_model("tiny:qwen2:64:2:128", initializer_range=0.2).model
    assert isinstance(model, Decoder)
    return model


def test_values_begin_at_zero_and_are_float32(decoder: Decoder) -> None:
    critic, sequences = ValueModel(decoder.bfloat16()), packed(3, 5)
    values = critic(torch.arange(8), sequences.positions, PackedAttention(sequences))
    assert values.shape == (8,)
    assert values.dtype == torch.float32
    assert not values.any()


def test_a_value_is_the_head_times_the_hidden_state_even_under_autocast(decoder: Decoder) -> None:
    critic, sequences = ValueModel(decoder), packed(3, 5)
    torch.nn.init.normal_(critic.value_head.weight)
    hidden = decoder(torch.arange(8), sequences.positions, PackedAttention(sequences))
    expected = (hidden.double() @ critic.value_head.weight[0].double()).float()
    torch.testing.assert_close(
        critic(torch.arange(8), sequences.positions, PackedAttention(sequences)), expected, rtol=1e-5, atol=1e-5
    )


def test_gradients_reach_the_head_first_and_then_the_decoder(decoder: Decoder) -> None:
    critic, sequences = ValueModel(decoder), packed(4, 4)
    optimizer = torch.optim.SGD(critic.parameters(), lr=0.01)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = (critic(torch.arange(8), sequences.positions, PackedAttention(sequences)) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(1.0)
    assert losses[-1] < 0.5
    assert all(parameter.grad is not None for parameter in critic.parameters())


def test_an_output_projection_of_its_own_is_dropped(decoder: Decoder) -> None:
    untied = Decoder(type(decoder.config)(**{**vars(decoder.config), "tie_embeddings": False}))
    names = {name for name, _ in ValueModel(untied).named_parameters()}
    assert "decoder.lm_head.weight" not in names
    assert "value_head.weight" in names
