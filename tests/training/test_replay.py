"""Router replay: training computes with what rollout chose, token by token, and refuses what does not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from siirl.data.batch import Batch, Ragged
from siirl.device.collectives import Collectives
from siirl.errors import RequestError, SiirlError
from siirl.model.decoder import Decoder, PackedAttention
from siirl.model.experts import Routing
from siirl.rollout.contract import Completions
from siirl.rollout.engine import NativeEngine
from siirl.rollout.sampling import Sampling
from siirl.telemetry.accumulator import StepMetrics
from siirl.training.losses import LOSSES
from siirl.training.replay import COLUMN
from siirl_kernels.packing import PackedSequences
from tests.device_under_test import device
from tests.training.batches import config
from tests.training.test_balance import EXPERTS, mixture, reference_counts
from tests.training.test_updates import engine, update, weights

PROMPTS = [[5, 6, 7], [9], list(range(11, 46)), [20, 21], [40, 41, 42, 43], [30, 31]]
GROUP = 3
LIMIT = 20


def generate(decoder: Decoder, prompts: list[list[int]] = PROMPTS, group: int = GROUP, **options: Any) -> Completions:
    made = NativeEngine(decoder, [1], str, record_routing=True, **options)
    return made.generate(prompts, torch.arange(len(prompts) * group), Sampling(LIMIT), group, 0)


def perturbed(decoder: Decoder, scale: float = 0.05) -> Decoder:
    """The same model but for its routers: some tokens go elsewhere."""
    other = mixture().to(device())
    other.load_state_dict(decoder.state_dict())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in other.named_parameters():
            if name.endswith("mlp.gate.weight"):
                weight += scale * torch.randn(weight.shape, generator=generator).to(weight.device)
    return other


def rows(done: Completions, replay: bool = True) -> Batch:
    """What training gets of responses to `PROMPTS`."""
    slots = torch.arange(len(PROMPTS)).repeat_interleave(GROUP)
    prompts = Ragged.from_lists([torch.tensor(prompt) for prompt in PROMPTS], torch.int64)
    advantages = torch.randn(len(done.log_probs.values), generator=torch.Generator().manual_seed(2))
    samples = Batch(
        {
            "sample_id": torch.arange(len(slots)),
            "slot": slots,
            "prompt_ids": prompts.take(slots),
            "response_ids": done.response_ids,
            "rollout_log_probs": done.log_probs,
            "advantages": Ragged(advantages, done.log_probs.offsets),
        }
    )
    assert done.router_choices is not None
    return samples.with_columns(**{COLUMN: done.router_choices}) if replay else samples


def settings(**changes: object) -> Any:
    return config(rollout__max_new_tokens=LIMIT, **changes)


def own_choices(decoder: Decoder, done: Completions) -> list[Tensor]:
    """Of each response's input, by a packed pass over it alone."""
    found = []
    for row, response in enumerate(done.response_ids.rows()):
        tokens = torch.cat((torch.tensor(PROMPTS[row // GROUP]), response[:-1])).to(device())
        packed, routing = PackedSequences((len(tokens),), device()), Routing()
        with torch.no_grad():
            decoder(tokens, packed.positions, PackedAttention(packed), routing=routing)
        found.append(routing.chosen_TLK.cpu())
    return found


@pytest.mark.parametrize("options", [{}, {"max_sequences": 4}, {"chunk_tokens": 7}, {"cache_bytes": 60_000}], ids=str)
def test_choices_of_every_input_token_are_recorded(options: dict[str, int]) -> None:
    decoder = mixture().to(device())
    done = generate(decoder, **options)
    assert done.router_choices is not None
    assert done.response_ids.lengths.min() < LIMIT  # some end before the limit
    for recorded, own in zip(done.router_choices.rows(), own_choices(decoder, done), strict=True):
        assert torch.equal(recorded.long().sort(-1).values, own.sort(-1).values)


def test_a_prompt_found_in_the_cache_has_the_choices_of_the_call_that_computed_it() -> None:
    decoder = mixture().to(device())
    made = NativeEngine(decoder, [1], str, record_routing=True)
    first, again = (
        made.generate([PROMPTS[2]], torch.arange(2) + n, Sampling(LIMIT), 2, 0).router_choices for n in (0, 2)
    )
    assert first is not None and again is not None
    assert torch.equal(first.rows()[0][:35], again.rows()[1][:35])
    assert (again.values >= 0).all()


@pytest.mark.parametrize("budget", [1, 100, 10_000])
def test_replay_makes_training_agree_with_rollout_where_routers_differ(budget: int) -> None:
    decoder = mixture().to(device())
    done = generate(perturbed(decoder))

    def difference(samples: Batch) -> float:
        trained = engine(settings(training__micro_batch_tokens=budget), model=decoder)
        return float((trained.log_probs(samples, 1).values - done.log_probs.values).abs().mean())

    def planted(shift: int) -> Batch:
        """Every token is told the choices of another one of its row."""
        assert done.router_choices is not None
        moved = [row.roll(shift, 0) for row in done.router_choices.rows()]
        return rows(done).with_columns(**{COLUMN: Ragged(torch.cat(moved), done.router_choices.offsets)})

    without, replayed = difference(rows(done, replay=False)), difference(rows(done))
    assert replayed < 0.5 * without
    assert difference(planted(1)) > 1.5 * without


def test_replay_makes_rollout_in_bfloat16_agree_better() -> None:
    done = generate(mixture().to(device(), torch.bfloat16))
    apart = [
        (engine(settings(), model=mixture()).log_probs(rows(done, replay), 1).values - done.log_probs.values).abs()
        for replay in (False, True)
    ]
    assert apart[1].mean() < 0.9 * apart[0].mean()
    assert apart[1].max() < 0.7 * apart[0].max()


def test_wrong_choices_show_in_the_metrics() -> None:
    decoder = mixture().to(device())
    done = generate(decoder)
    assert done.router_choices is not None

    def measured(choices: Tensor) -> dict[str, float]:
        samples = rows(done).with_columns(**{COLUMN: Ragged(choices, done.router_choices.offsets)})
        return update(settings(), samples, model=mixture())[1]

    right, wrong = measured(done.router_choices.values), measured((done.router_choices.values + 1) % EXPERTS)
    assert right["rollout/router_agreement"] > 0.999
    assert right["rollout/logprob_diff_max"] < 1e-4
    assert wrong["rollout/router_agreement"] < 0.7
    assert wrong["rollout/logprob_diff_mean"] > 0.1


def test_unknown_choices_are_training_s_own() -> None:
    done = generate(mixture().to(device()))
    assert done.router_choices is not None
    unknown = Ragged(torch.full_like(done.router_choices.values, -1), done.router_choices.offsets)
    own = engine(settings(), model=mixture()).log_probs(rows(done, replay=False), 1)
    told = engine(settings(), model=mixture()).log_probs(rows(done).with_columns(**{COLUMN: unknown}), 1)
    assert torch.equal(own.values, told.values)


def test_weights_of_replayed_experts_are_trainings_own_with_their_gradient() -> None:
    """A step on replayed rows moves the router as the loss written down plainly with these choices does."""
    done = generate(perturbed(mixture().to(device())))
    samples = rows(done)
    trained, _ = update(settings(training__micro_batch_tokens=100), samples, model=mixture())
    model, total = mixture().to(device()), torch.zeros((), device=device())
    for i in range(len(samples)):
        prompt, response, choices, advantages = (
            samples.ragged(name).rows()[i].to(device()) for name in ("prompt_ids", "response_ids", COLUMN, "advantages")
        )
        tokens = torch.cat((prompt, response[:-1]))
        packed = PackedSequences((len(tokens),), device())
        logits = model.logits(model(tokens, packed.positions, PackedAttention(packed), routing=Routing(choices)))
        log_probs = logits[len(prompt) - 1 :].log_softmax(-1).gather(1, response[:, None]).squeeze(1)
        total = total - ((log_probs - log_probs.detach()).exp() * advantages).sum()
    (total / len(samples.ragged("response_ids").values)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        expected = (parameter.detach() - 0.5 * parameter.grad).cpu()
        torch.testing.assert_close(weights(trained)[name], expected, atol=1e-6, rtol=1e-5)


def test_the_balance_loss_counts_replayed_choices() -> None:
    done = generate(perturbed(mixture().to(device()), scale=0.5))
    assert done.router_choices is not None
    _, metrics = update(
        settings(training__router_aux_coef=0.1, training__micro_batch_tokens=60), rows(done), model=mixture()
    )
    load = reference_counts(done.router_choices.values.long()).double()
    assert metrics["actor/router_load_max"] == pytest.approx(float((load / load.mean(1, keepdim=True)).max()))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda c: Ragged(c.values[:, :1], c.offsets),
            r"are \[layers, experts of a token\] = \[1, 2\], .* has \[2, 2\]",
        ),
        (lambda c: Ragged(c.values + 4, c.offsets), "chose an expert that is none of the model's 5"),
        (lambda c: c.take(torch.arange(len(c)).roll(1)), "of row 0 are of .* tokens, and it has"),
    ],
    ids=["shape", "number", "rows"],
)
def test_choices_that_do_not_fit_are_refused(change: Any, says: str) -> None:
    done = generate(mixture().to(device()))
    samples = rows(done).with_columns(**{COLUMN: change(done.router_choices)})
    trained = engine(settings(), model=mixture())
    with pytest.raises(SiirlError, match=says):
        trained.update(samples, LOSSES["policy"](settings().algorithm), 1, StepMetrics())


def test_a_model_without_experts_refuses_the_key() -> None:
    with pytest.raises(RequestError, match=r"rollout.router_replay needs a mixture of experts .* leave the key out"):
        engine(settings(rollout__router_replay=True), Collectives.single())
