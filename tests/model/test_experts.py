"""A mixture of experts: how its checkpoints are read, and that a shared prompt is one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from siirl.errors import RequestError
from siirl.model.decoder import Decoder, PackedAttention
from siirl.model.experts import Routing
from siirl.model.load import load_model
from siirl_kernels.packing import PackedSequences
from tests.device_under_test import device
from tests.model.small_models import run_alone, run_packed
from tests.model.test_parity import EXPERTS

Saved = Callable[..., tuple[PreTrainedModel, Path]]
FIRST = "model.layers.0.mlp.experts"


@pytest.fixture
def directory(saved: Saved) -> Path:
    return saved("qwen3_moe", **EXPERTS)[1]


def rewritten(directory: Path, change: Callable[[dict[str, Tensor]], None]) -> str:
    """The directory with other tensors in it."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return str(directory)


def test_a_checkpoint_names_each_expert_apart(directory: Path) -> None:
    published = load_file(directory / "model.safetensors")
    stacked = load_model(str(directory)).model.state_dict()
    assert f"{FIRST}.gate_up_proj" not in published
    for expert in range(6):
        gate, up, down = (published[f"{FIRST}.{expert}.{name}_proj.weight"] for name in ("gate", "up", "down"))
        assert torch.equal(stacked[f"{FIRST}.gate_up_proj"][expert], torch.cat((gate, up)))
        assert torch.equal(stacked[f"{FIRST}.down_proj"][expert], down)


def test_a_checkpoint_with_stacked_experts_is_read_too(saved: Saved, sequences: list[list[int]]) -> None:
    theirs, directory = saved("qwen3_moe", **EXPERTS)
    save_file(theirs.state_dict(), directory / "model.safetensors", metadata={"format": "pt"})
    with torch.no_grad():
        found = run_packed(load_model(str(directory)).model, sequences)
        for want, got in zip(run_alone(theirs, sequences), found, strict=True):
            assert (got - want).abs().max() <= 1e-4


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop(f"{FIRST}.3.up_proj.weight"), f"lacks 1 weights of experts, the first is {FIRST}.3.up_proj"),
        (lambda t: t.update({f"{FIRST}.6.up_proj.weight": torch.ones(40, 48)}), f"the first is {FIRST}.6.up_proj"),
        (
            lambda t: t.update({f"{FIRST}.2.down_proj.weight": torch.ones(48, 39)}),
            f"{FIRST}.2.down_proj.weight has another shape than the first expert",
        ),
    ],
    ids=["missing", "too many", "another shape"],
)
def test_experts_that_do_not_fit_are_refused(change: Any, says: str, directory: Path) -> None:
    with pytest.raises(RequestError, match=says):
        load_model(rewritten(directory, change))


def gradients(decoder: Decoder, sequences: PackedSequences, tokens: list[int], used: Tensor) -> dict[str, Tensor]:
    decoder.zero_grad()
    attention = PackedAttention(sequences)
    hidden = decoder(torch.tensor(tokens, device=device()), sequences.positions, attention)
    logits = decoder.logits(hidden[used.to(device())])
    logits.log_softmax(-1)[:, 7].sum().backward()
    assert all(p.grad is not None for p in decoder.parameters())
    return {name: p.grad.clone() for name, p in decoder.named_parameters() if p.grad is not None}


def test_groups_behind_one_copy_of_their_prompts_have_the_gradients_of_the_plain_form(directory: Path) -> None:
    decoder = load_model(str(directory)).model.to(device())
    assert isinstance(decoder, Decoder)
    prompts, responses = [[5, 6, 7, 8], [90, 91]], [[[11, 12], [13]], [[14, 15, 16], [17], [18, 19]]]
    plain = [prompt + one for prompt, group in zip(prompts, responses, strict=True) for one in group]
    whole = PackedSequences(tuple(map(len, plain)), device())
    packed = [[*prompts[0], 11, 12], [13], [*prompts[1], 14, 15, 16], [17], [18, 19]]
    shared = PackedSequences(tuple(map(len, packed)), device(), (0, 0, 2, 2, 2), (0, 4, 0, 2, 2))
    # the response tokens, where both forms have them
    last = [-len(one) for group in responses for one in group]
    used_plain = torch.cat(
        [s + n + torch.arange(k, 0) for s, n, k in zip(whole.starts, whole.lengths, last, strict=True)]
    )
    used = torch.cat([s + n + torch.arange(k, 0) for s, n, k in zip(shared.starts, shared.lengths, last, strict=True)])
    want = gradients(decoder, whole, sum(plain, []), used_plain)
    found = gradients(decoder, shared, sum(packed, []), used)
    for name, gradient in want.items():
        assert float((found[name] - gradient).abs().max()) <= 1e-4 * float(gradient.abs().max()), name


def test_told_its_own_choice_a_model_computes_the_same_bits(directory: Path, sequences: list[list[int]]) -> None:
    decoder = load_model(str(directory)).model.to(device())
    packed = PackedSequences(tuple(map(len, sequences)), device())
    tokens = torch.tensor(sum(sequences, []), device=device())

    def run(routing: Routing) -> Tensor:
        with torch.no_grad():
            return decoder(tokens, packed.positions, PackedAttention(packed), routing=routing)

    free = Routing()
    hidden = run(free)
    assert free.chosen_TLK.shape == (len(tokens), 2, 2)
    assert len(free.chosen_TLK.unique()) == 6
    told = Routing(free.chosen_TLK.to(torch.int16))
    assert torch.equal(run(told), hidden)
    assert torch.equal(told.chosen_TLK, free.chosen_TLK)
    elsewhere = Routing((free.chosen_TLK + 1) % 6)
    assert (run(elsewhere) - hidden).abs().max() > 0.1
