"""The load-balance loss is that of `transformers` over all rows, whatever the split, and evens the load out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from siirl.config.schema import Config
from siirl.data.batch import Batch
from siirl.errors import RequestError
from siirl.model.decoder import Decoder, PackedAttention
from siirl.model.experts import Routing
from siirl_kernels.packing import PackedSequences
from tests.training.batches import batch, config, decoder
from tests.training.test_updates import engine, update, weights

COEF = 0.3
EXPERTS = 5


def mixture(coef: float = 0.001) -> Decoder:
    """Three layers, of which the second has an MLP."""
    shape = replace(
        decoder().config,
        family="qwen3_moe",
        num_layers=3,
        num_experts=EXPERTS,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        norm_topk_prob=True,
        mlp_only_layers=(1,),
        router_aux_loss_coef=coef,
    )
    model = Decoder(shape)
    model.initialize(torch.Generator().manual_seed(5))
    return model


def settings(coef: float | None = COEF, **changes: object) -> Config:
    return config(training__router_aux_coef=coef, **changes)


def samples() -> Batch:
    return batch().drop(["old_log_probs", "ref_log_probs"])


def router_logits(model: Decoder) -> list[Tensor]:
    """Of each layer with experts, over the inputs of all rows that have not failed, one row after another."""
    rows = [i for i in range(12) if not samples().dense("failed")[i]]
    prompts, responses = (samples().ragged(name).rows() for name in ("prompt_ids", "response_ids"))
    inputs = [torch.cat((prompts[i], responses[i][:-1])) for i in rows]
    packed = PackedSequences(tuple(map(len, inputs)), torch.device("cpu"))
    routing = Routing()
    model(torch.cat(inputs), packed.positions, PackedAttention(packed), routing=routing)
    return [routing.layers[i].probs_TE.log() for i in range(len(routing.layers))]


def reference_loss(model: Decoder) -> Tensor:
    """The mean over layers of what `transformers` computes of one layer's router logits."""
    losses = [load_balancing_loss_func((logits,), EXPERTS, 2) for logits in router_logits(model)]
    return torch.stack([x for x in losses if isinstance(x, Tensor)]).mean()


@pytest.mark.parametrize("budget", [1, 24, 10_000])
def test_loss_and_gradient_are_those_of_transformers_over_all_rows(budget: int) -> None:
    silent = samples()
    advantages = silent.ragged("advantages")
    silent = silent.with_columns(advantages=type(advantages)(0 * advantages.values, advantages.offsets))
    model = mixture()
    loss = reference_loss(model)
    (COEF * loss).backward()
    trained, metrics = update(settings(training__micro_batch_tokens=budget), silent, model=mixture())
    assert metrics["actor/router_aux_loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert metrics["actor/loss"] == pytest.approx(COEF * loss.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        moved = 0.0 if parameter.grad is None else 0.5 * parameter.grad
        torch.testing.assert_close(weights(trained)[name], parameter.detach() - moved, atol=1e-6, rtol=1e-5)
    gate = model.blocks[0].mlp.gate.weight.grad
    assert gate.abs().max() > 1e-3  # with a loss that does not reach the router the comparison would show nothing


def reference_counts(chosen_TLK: Tensor) -> Tensor:
    """Tokens of each expert, [L, E]."""
    return torch.stack([torch.bincount(x.flatten(), minlength=EXPERTS) for x in chosen_TLK.unbind(1)])


def test_load_is_counted_from_the_choices() -> None:
    chosen = [logits.topk(2, -1).indices for logits in router_logits(mixture())]
    load = reference_counts(torch.stack(chosen, 1)).double()
    load = load / load.mean(1, keepdim=True)
    _, metrics = update(settings(0.0, training__micro_batch_tokens=24), samples(), model=mixture())
    assert metrics["actor/router_load_max"] == pytest.approx(float(load.max()))
    assert metrics["actor/router_load_min"] == pytest.approx(float(load.min()))
    assert metrics["actor/router_aux_loss"] == pytest.approx(reference_loss(mixture()).item(), rel=1e-5)


def test_micro_batch_size_does_not_change_the_update() -> None:
    (one, m1), (many, m2) = (
        update(settings(training__micro_batch_tokens=budget, algorithm__mini_batches=2), samples(), model=mixture())
        for budget in (10_000, 1)
    )
    assert m1 == pytest.approx(m2, rel=1e-4, abs=1e-6)
    for name, tensor in weights(one).items():
        torch.testing.assert_close(weights(many)[name], tensor, atol=1e-6, rtol=1e-5)


def test_null_is_the_checkpoints_coefficient_and_zero_leaves_the_loss_out() -> None:
    _, own = update(settings(None), samples(), model=mixture(coef=COEF))
    _, given = update(settings(COEF), samples(), model=mixture())
    _, none = update(settings(0.0), samples(), model=mixture())
    assert own["actor/loss"] == given["actor/loss"]
    assert none["actor/loss"] == pytest.approx(given["actor/loss"] - COEF * given["actor/router_aux_loss"], abs=1e-6)


def test_a_model_without_experts_refuses_the_coefficient() -> None:
    with pytest.raises(RequestError, match=r"training.router_aux_coef is 0.3, but model.path .* has no experts"):
        engine(settings())
    engine(settings(None))
    engine(settings(0.0))


def test_the_loss_evens_out_the_load() -> None:
    silent = samples()
    advantages = silent.ragged("advantages")
    silent = silent.with_columns(advantages=type(advantages)(0 * advantages.values, advantages.offsets))
    with_it = settings(1.0, training__optimizer="adamw", training__lr=3e-3)
    _, before = update(with_it, silent, model=mixture())
    trained, _ = update(with_it, silent, model=mixture(), steps=30)
    _, after = update(with_it, silent, model=trained.model)
    assert before["actor/router_aux_loss"] > 2.1  # balanced, it is the number of a token's experts
    assert after["actor/router_aux_loss"] < 2 + 0.5 * (before["actor/router_aux_loss"] - 2)
    assert after["actor/router_load_max"] < before["actor/router_load_max"]
