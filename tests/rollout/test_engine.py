"""The built-in engine says what `transformers` says, computes a prompt once, and does not depend on the batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from siirl.errors import SiirlError
from siirl.model.config import DecoderConfig
from siirl.model.decoder import Decoder, PackedAttention
from siirl.model.export import save_pretrained
from siirl.model.load import load_model
from siirl.rollout.contract import LENGTH, STOP, SleepLevel
from siirl.rollout.engine import NativeEngine
from siirl.rollout.sampling import Sampling
from siirl_kernels import bind
from siirl_kernels.packing import PackedSequences
from tests.device_under_test import backend, device

FAMILIES = ["llama", "qwen2", "qwen3", "qwen3_moe"]
EXPERTS: dict[str, Any] = {
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "mlp_only_layers": (0,),
}
PROMPTS = [[5, 6, 7], [9], [11, 12, 13, 14, 15, 16, 17], [20, 21], [40, 41, 42, 43]]


@pytest.fixture(params=["references", "kernels of the device"], autouse=True)
def _bound(request: pytest.FixtureRequest) -> Iterator[None]:
    bind([] if request.param == "references" else backend().kernel_order())
    yield
    bind([])


def tiny(family: str = "qwen3", eos: tuple[int, ...] = ()) -> Decoder:
    config = DecoderConfig(
        family=family,
        vocab_size=99,
        hidden_size=32,
        intermediate_size=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        max_positions=256,
        qkv_bias=family == "qwen2",
        qk_norm=family.startswith("qwen3"),
        initializer_range=0.3,
        eos_token_ids=eos,
        **(EXPERTS if family == "qwen3_moe" else {}),
    )
    decoder = Decoder(config)
    decoder.initialize(torch.Generator().manual_seed(1))
    return decoder.to(device())


def engine(decoder: torch.nn.Module, **options) -> NativeEngine:
    return NativeEngine(decoder, [1], lambda ids: "".join(chr(32 + i) for i in ids), **options)


def generate(decoder: torch.nn.Module, sampling: Sampling, group: int = 3, seed: int = 0, **options):
    ids = torch.arange(len(PROMPTS) * group) * 7 + 3
    return engine(decoder, **options).generate(PROMPTS, ids, sampling, group, seed)


def as_lists(completions) -> list[list[int]]:
    return [row.tolist() for row in completions.response_ids.rows()]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_transformers_token_by_token(family: str, tmp_path) -> None:
    from transformers import AutoModelForCausalLM

    tokenizer = load_model("tiny:qwen3:32:1:99").tokenizer
    save_pretrained(tiny(family), tokenizer, tmp_path)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    done = generate(tiny(family), Sampling(20, temperature=0.0, ignore_eos=True), group=1)
    for prompt, response in zip(PROMPTS, as_lists(done), strict=True):
        ids = torch.tensor([prompt])
        expected = reference.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=20,
            do_sample=False,
            eos_token_id=None,
            suppress_tokens=[1],
        )
        assert response == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_are_those_of_a_packed_forward_pass(temperature: float, family: str) -> None:
    decoder = tiny(family)
    done = generate(decoder, Sampling(12, temperature))
    for i, (response, log_probs) in enumerate(zip(done.response_ids.rows(), done.log_probs.rows(), strict=True)):
        prompt = torch.tensor(PROMPTS[i // 3])
        sequence = PackedSequences((len(prompt) + len(response),), device())
        tokens = torch.cat((prompt, response)).to(device())
        with torch.no_grad():
            hidden = decoder(tokens, sequence.positions, PackedAttention(sequence))
            logits = decoder.logits(hidden[len(prompt) - 1 : -1]).cpu() / temperature
        expected = torch.log_softmax(logits, -1).gather(1, response[:, None]).squeeze(1)
        torch.testing.assert_close(log_probs, expected, atol=1e-5, rtol=0)


def test_weights_that_training_changed_in_place_are_used_by_the_next_call() -> None:
    decoder = tiny()
    made, ids, sampling = engine(decoder), torch.arange(len(PROMPTS)), Sampling(12)
    before = made.generate(PROMPTS, ids, sampling, 1, 0)
    with torch.no_grad():
        for weight in decoder.parameters():
            weight.mul_(1.5)
    after, anew = (e.generate(PROMPTS, ids, sampling, 1, 0) for e in (made, engine(decoder)))
    assert as_lists(after) == as_lists(anew) != as_lists(before)
    assert torch.equal(after.log_probs.values, anew.log_probs.values)


def test_responses_end_at_the_end_token_or_the_limit() -> None:
    done = generate(tiny(), Sampling(40, temperature=2.0), group=8)
    assert set(done.finish_reason.tolist()) == {STOP, LENGTH}
    for response, reason in zip(as_lists(done), done.finish_reason.tolist(), strict=True):
        assert 1 not in response[:-1]
        assert (response[-1] == 1) == (reason == STOP)
        assert reason == STOP or len(response) == 40


@pytest.mark.parametrize("capacity", [3, 4, 7, 100])
def test_responses_do_not_depend_on_how_many_are_decoded_together(capacity: int) -> None:
    sampling = Sampling(30, temperature=1.5)
    together = generate(tiny(), sampling)
    refilled = generate(tiny(), sampling, max_sequences=capacity)
    assert as_lists(refilled) == as_lists(together)
    torch.testing.assert_close(refilled.log_probs.values, together.log_probs.values, atol=1e-5, rtol=0)


def test_a_small_cache_only_makes_the_batch_smaller() -> None:
    sampling = Sampling(30, temperature=1.5)
    assert as_lists(generate(tiny(), sampling, cache_bytes=1)) == as_lists(generate(tiny(), sampling))


def test_a_response_belongs_to_its_sample_id_and_the_seed() -> None:
    decoder, sampling = tiny(), Sampling(10)
    both = engine(decoder).generate(PROMPTS[:2], torch.tensor([100, 200]), sampling, 1, 0)
    alone = engine(decoder).generate(PROMPTS[1:2], torch.tensor([200]), sampling, 1, 0)
    other = engine(decoder).generate(PROMPTS[1:2], torch.tensor([200]), sampling, 1, 1)
    assert as_lists(alone)[0] == as_lists(both)[1] != as_lists(other)[0]


def test_a_prompt_is_computed_once_for_its_group() -> None:
    decoder, seen = tiny(), []
    decoder.model.embed_tokens.register_forward_hook(lambda module, args, out: seen.append(len(args[0])))
    done = generate(decoder, Sampling(6, ignore_eos=True), group=4)
    rows = len(PROMPTS) * 4
    # the first pass holds every prompt once; each further pass one token per response; the last token needs none
    assert seen == [sum(map(len, PROMPTS)), *[rows] * 5]
    assert len(done.response_ids) == rows


@pytest.mark.parametrize("level", [1, 2])
def test_weights_of_its_own_are_gone_while_it_sleeps_and_what_training_computes_with_stays(level: SleepLevel) -> None:
    shared, own = tiny(), tiny()
    engines = engine(shared), engine(own, own_weights=True)
    for made in engines:
        made.sleep(level)
        made.sleep(level)
    assert sum(p.numel() for p in own.parameters()) == 0
    assert_equal(shared, tiny())
    with pytest.raises(SiirlError, match="asleep and cannot take new weights"):
        engines[1].update_weights(shared.named_parameters(), 1)
    for made in engines:
        made.wake()
    assert_equal(shared, tiny())
    if level == 1:
        assert_equal(own, tiny())
    else:
        weights = dict(tiny().named_parameters())
        last = weights.popitem()
        engines[1].update_weights(weights.items(), 1)
        with pytest.raises(SiirlError, match=f"the weight '{last[0]}' was dropped"):
            engines[1].generate(PROMPTS[:1], torch.tensor([0]), Sampling(1), 1, 0)
        engines[1].update_weights([last], 1)
    results = [made.generate(PROMPTS, torch.arange(5), Sampling(8), 1, 0) for made in engines]
    assert as_lists(results[0]) == as_lists(results[1])


def assert_equal(decoder: Decoder, other: Decoder) -> None:
    for own, expected in zip(decoder.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(own, expected, atol=0, rtol=0)


def test_calls_share_the_memory_of_one_cache() -> None:
    made = engine(tiny())
    long, short = Sampling(30, temperature=1.5), Sampling(10, temperature=1.5)
    kept = []
    for sampling in (long, short, long):
        done = made.generate(PROMPTS, torch.arange(5), sampling, 1, 0)
        fresh = engine(tiny()).generate(PROMPTS, torch.arange(5), sampling, 1, 0)
        torch.testing.assert_close(done.log_probs.values, fresh.log_probs.values, atol=0, rtol=0)
        kept.append(made.cache.data_ptr())
    assert len(set(kept)) == 1


def test_an_abort_without_a_call_does_nothing() -> None:
    made = engine(tiny())
    made.abort()
    done = made.generate(PROMPTS, torch.arange(5), Sampling(8, ignore_eos=True), 1, 0)
    assert done.finish_reason.tolist() == [LENGTH] * 5


def test_stop_strings_end_a_response() -> None:
    decoder = tiny()
    free = as_lists(generate(decoder, Sampling(10, ignore_eos=True)))
    stop = chr(32 + free[0][3])
    stopped = generate(decoder, Sampling(10, ignore_eos=True, stop=(stop,)))
    for before, after in zip(free, as_lists(stopped), strict=True):
        token = ord(stop) - 32
        assert after == (before[: before.index(token) + 1] if token in before else before)
    assert stopped.finish_reason[0] == STOP


def test_a_model_without_a_cache_generates_the_same() -> None:
    class Uncached(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny()

        def forward(self, *args):
            return self.inner(*args)

        @property
        def head_weight(self):
            return self.inner.head_weight

        def logits(self, hidden):
            return self.inner.logits(hidden)

    sampling = Sampling(12, temperature=1.3)
    assert as_lists(generate(Uncached(), sampling)) == as_lists(generate(tiny(), sampling))


def test_no_prompts_give_no_responses() -> None:
    done = engine(tiny()).generate([], torch.empty(0, dtype=torch.int64), Sampling(5), 4, 0)
    assert len(done.response_ids) == 0 and len(done.finish_reason) == 0


def test_new_weights_change_the_answers_and_the_version() -> None:
    target, source = engine(tiny()), tiny("qwen3")
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.mul_(1.5)
    before = as_lists(target.generate(PROMPTS, torch.arange(5), Sampling(8), 1, 0))
    target.update_weights(source.named_parameters(), 7)
    after = target.generate(PROMPTS, torch.arange(5), Sampling(8), 1, 0)
    assert after.version == 7
    assert as_lists(after) == as_lists(engine(source).generate(PROMPTS, torch.arange(5), Sampling(8), 1, 0)) != before
