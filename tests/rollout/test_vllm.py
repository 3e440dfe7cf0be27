"""vLLM as the rollout engine, for real on the host: it says what the built-in engine and a forward pass say."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from torch import Tensor

from siirl.device.backend import EngineSpec
from siirl.errors import RequestError, SiirlError
from siirl.model.config import DecoderConfig
from siirl.model.decoder import Decoder, PackedAttention
from siirl.rollout.contract import ABORTED, LENGTH, STOP
from siirl.rollout.engine import NativeEngine
from siirl.rollout.sampling import Sampling
from siirl_cpu import CpuBackend
from siirl_kernels.packing import PackedSequences
from siirl_npu import NpuBackend
from tests.device_under_test import backend

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed here: make test-vllm"),
]

PROMPTS = [[5, 6, 7], [9], [11, 12, 13, 14, 15, 16, 17], [20, 21], [40, 41, 42, 43]]
LONG = [list(range(10, 90)), list(range(20, 95))]  # more than a block, so that the prefix cache holds it
EOS = 1
GREEDY = Sampling(20, temperature=0.0)
# of log-probs in float32: sums in another order
BOUND = 2e-5
STARTED: list[Any] = []  # an engine that is collected takes vLLM's process groups away from the others


def tiny(family: str = "qwen3", seed: int = 1, **options: Any) -> Decoder:
    config = {
        "family": family,
        "vocab_size": 99,
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 32,
        "max_positions": 256,
        "qkv_bias": family == "qwen2",
        "qk_norm": family.startswith("qwen3"),
        "initializer_range": 0.15,
    }
    if family == "qwen3_moe":
        config |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96, "norm_topk_prob": True}
    decoder = Decoder(DecoderConfig(**(config | options)))
    decoder.initialize(torch.Generator().manual_seed(seed))
    return decoder.requires_grad_(False)


def text(ids: list[int]) -> str:
    return "".join(chr(32 + i) for i in ids)


def start(decoder: Decoder, device: Any = None, dtype: torch.dtype = torch.float32, **size: int) -> Any:
    from siirl.rollout.vllm import VllmEngine, VllmSize

    limits = {"max_length": 128, "max_sequences": 64, "cache_bytes": 2**30} | size
    engine = VllmEngine(decoder, [EOS], text, device or backend(), dtype, VllmSize(**limits))
    STARTED.append(engine)
    return engine


@pytest.fixture(scope="module")
def started() -> Any:
    return start(tiny())


@pytest.fixture
def engine(started: Any) -> Any:
    """One engine for all tests, with the weights of `tiny()`."""
    started.wake()
    started.update_weights(tiny().named_parameters(), started.version + 1)
    return started


def ids(count: int) -> Tensor:
    return torch.arange(count) * 7 + 3


def native(decoder: Decoder, sampling: Sampling, prompts: Sequence[Sequence[int]] = PROMPTS, group: int = 1) -> Any:
    made = NativeEngine(decoder, [EOS], text)
    return made.generate(prompts, ids(len(prompts) * group), sampling, group, 0)


def generate(
    engine: Any, sampling: Sampling, prompts: Sequence[Sequence[int]] = PROMPTS, group: int = 1, seed: int = 0
) -> Any:
    return engine.generate(prompts, ids(len(prompts) * group), sampling, group, seed)


def as_lists(done: Any) -> list[list[int]]:
    return [row.tolist() for row in done.response_ids.rows()]


def forward_logits(decoder: Decoder, prompt: Sequence[int], response: Tensor) -> Tensor:
    """Of every token of the vocabulary at each place of the response, by one packed forward pass."""
    tokens = torch.cat((torch.tensor(prompt), response))
    sequence = PackedSequences((len(tokens),), torch.device("cpu"))
    hidden = decoder(tokens, sequence.positions, PackedAttention(sequence))
    return decoder.logits(hidden[len(prompt) - 1 : -1])


def forward_log_probs(decoder: Decoder, prompt: Sequence[int], response: Tensor, temperature: float) -> Tensor:
    return torch.log_softmax(forward_logits(decoder, prompt, response) / temperature, -1)


def assert_same(done: Any, expected: Any) -> None:
    assert as_lists(done) == as_lists(expected)
    assert done.finish_reason.tolist() == expected.finish_reason.tolist()
    torch.testing.assert_close(done.log_probs.values, expected.log_probs.values, atol=BOUND, rtol=0)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_greedy_equals_the_built_in_engine_token_by_token(family: str, tied: bool) -> None:
    decoder = tiny(family, tie_embeddings=tied)
    engine = start(decoder)
    engine.update_weights(decoder.named_parameters(), 1)
    for sampling in (GREEDY, Sampling(20, temperature=0.0, ignore_eos=True)):
        assert_same(generate(engine, sampling), native(decoder, sampling))


@pytest.mark.parametrize(
    "sampling",
    [Sampling(12), Sampling(12, 0.7), Sampling(12, 1.5, top_p=0.8, top_k=20, min_p=0.05), Sampling(12, 0.0)],
    ids=["plain", "cold", "filtered", "greedy"],
)
def test_log_probs_are_those_of_a_forward_pass_at_the_temperature_before_any_filter(
    engine: Any, sampling: Sampling
) -> None:
    done = generate(engine, sampling, group=3)
    for i, (response, log_probs) in enumerate(zip(done.response_ids.rows(), done.log_probs.rows(), strict=True)):
        computed = forward_log_probs(tiny(), PROMPTS[i // 3], response, sampling.temperature or 1.0)
        expected = computed.gather(1, response[:, None]).squeeze(1)
        torch.testing.assert_close(log_probs, expected, atol=BOUND, rtol=0)


def chi_square_tail(observed: np.ndarray, expected: np.ndarray) -> float:
    """The chance of a statistic as large as this one (Pearson), where the distribution is the one expected."""
    statistic = ((observed - expected) ** 2 / expected).sum()
    half = torch.tensor([(len(expected) - 1) / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


@pytest.mark.parametrize(
    "sampling",
    [Sampling(1, 0.7), Sampling(1, 1.6, top_k=8), Sampling(1, 1.0, top_p=0.6), Sampling(1, 1.2, ignore_eos=True)],
    ids=["cold", "top-k", "top-p", "no end"],
)
def test_frequencies_are_those_of_the_filtered_distribution(engine: Any, sampling: Sampling) -> None:
    count, prompt = 3000, [5, 6, 7]
    drawn = generate(engine, sampling, [prompt], count).response_ids.values
    p = forward_log_probs(tiny(), prompt, torch.tensor([0]), sampling.temperature)[0].exp().double().numpy()
    order = np.argsort(-p)
    if sampling.top_k:
        p[order[sampling.top_k :]] = 0
    before = np.cumsum(p[order]) - p[order]
    p[order[before >= sampling.top_p]] = 0
    if sampling.ignore_eos:
        p[EOS] = 0
    p /= p.sum()
    observed = np.bincount(drawn.numpy(), minlength=len(p))
    assert observed[p == 0].sum() == 0
    likely = p * count >= 5
    rare = p[~likely].sum() * count
    expected = np.append(p[likely] * count, rare) if rare else p[likely] * count
    seen = np.append(observed[likely], observed[~likely].sum()) if rare else observed[likely]
    assert chi_square_tail(seen, expected) > 1e-3


def test_new_weights_are_those_of_a_fresh_engine_and_no_cache_outlives_them(engine: Any) -> None:
    before = generate(engine, GREEDY, LONG)
    for version, seed in enumerate((2, 3, 4), start=engine.version + 1):
        decoder = tiny(seed=seed)
        engine.update_weights(decoder.named_parameters(), version)
        expected = native(decoder, GREEDY, LONG)
        for weight in decoder.parameters():
            weight.fill_(torch.nan)  # training goes on with its own tensors
        done = generate(engine, GREEDY, LONG)
        assert done.version == version
        assert as_lists(done) != as_lists(before)
        assert_same(done, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_weights_are_rounded_to_the_dtype_of_the_engine(dtype: torch.dtype) -> None:
    decoder = tiny()
    engine = start(decoder, dtype=dtype)
    engine.update_weights(decoder.named_parameters(), 1)
    done = generate(engine, Sampling(8, 0.7))
    rounded = tiny()
    for weight in rounded.parameters():
        weight.copy_(weight.to(dtype))
    for prompt, response, log_probs in zip(PROMPTS, done.response_ids.rows(), done.log_probs.rows(), strict=True):
        expected = forward_log_probs(rounded, prompt, response, 0.7).gather(1, response[:, None]).squeeze(1)
        torch.testing.assert_close(log_probs, expected, atol=0.3, rtol=0)  # logits of 10 have 2⁻⁴ of rounding


def test_weights_that_do_not_arrive_are_missed(engine: Any) -> None:
    weights = dict(tiny(seed=2).named_parameters())
    del weights["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(SiirlError, match=r"weights of version 9 .* model.layers.1.mlp.up_proj.weight is missing"):
        engine.update_weights(weights.items(), 9)
    assert engine.version != 9


def test_an_engine_without_weights_does_not_generate() -> None:
    with pytest.raises(SiirlError, match=r"vLLM has no weight 'model\.embed_tokens\.weight' yet"):
        generate(start(tiny()), GREEDY)


def test_stale_weights_show_in_the_log_probs(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The head tied to the embedding keeps a packed copy, which a reload of the checkpoint's tensors does not reach."""
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

    nothing = lambda method, layer: None  # noqa: E731
    monkeypatch.setattr(UnquantizedEmbeddingMethod, "process_weights_after_loading", nothing)
    decoder = tiny(seed=2)
    engine.update_weights(decoder.named_parameters(), engine.version + 1)
    done = generate(engine, GREEDY)
    differences = []
    for prompt, response, log_probs in zip(PROMPTS, done.response_ids.rows(), done.log_probs.rows(), strict=True):
        expected = forward_log_probs(decoder, prompt, response, 1.0).gather(1, response[:, None]).squeeze(1)
        differences.append(float((log_probs - expected).abs().max()))
    assert min(differences) > 1000 * BOUND


def test_a_response_belongs_to_its_sample_id_and_the_seed(engine: Any) -> None:
    sampling = Sampling(10, temperature=1.5)
    together = engine.generate(PROMPTS, ids(15), sampling, 3, 0)
    for i, prompt in enumerate(PROMPTS):
        alone = engine.generate([prompt], ids(15)[3 * i : 3 * i + 3], sampling, 3, 0)
        assert as_lists(alone) == as_lists(together)[3 * i : 3 * i + 3]
    assert as_lists(engine.generate(PROMPTS, ids(15), sampling, 3, 1)) != as_lists(together)
    assert len({tuple(response) for response in as_lists(together)[:3]}) == 3


def test_responses_end_at_the_end_token_or_the_limit(engine: Any) -> None:
    done = generate(engine, Sampling(40, temperature=2.0), group=8)
    assert set(done.finish_reason.tolist()) == {STOP, LENGTH}
    for response, reason in zip(as_lists(done), done.finish_reason.tolist(), strict=True):
        assert EOS not in response[:-1]
        assert (response[-1] == EOS) == (reason == STOP)
        assert reason == STOP or len(response) == 40


def test_end_tokens_are_never_drawn_where_they_are_ignored(engine: Any) -> None:
    done = generate(engine, Sampling(40, temperature=2.0, ignore_eos=True), group=8)
    assert EOS not in done.response_ids.values
    assert done.response_ids.lengths.tolist() == [40] * 40


def test_stop_strings_end_a_response_with_the_token_that_completes_them(engine: Any) -> None:
    free = generate(engine, Sampling(20, temperature=0.0, ignore_eos=True))
    stop = tuple(text(response[8:10]) for response in as_lists(free)[:2])
    sampling = Sampling(20, temperature=0.0, ignore_eos=True, stop=stop)
    done = generate(engine, sampling)
    assert_same(done, native(tiny(), sampling))
    assert STOP in done.finish_reason.tolist()
    last = Sampling(10, temperature=0.0, ignore_eos=True, stop=stop)  # the string ends where the length does
    assert_same(generate(engine, last), native(tiny(), last))


@pytest.mark.parametrize("which", [None, [1, 3]], ids=["all", "some"])
def test_another_thread_aborts_responses_which_come_back_as_they_are(engine: Any, which: list[int] | None) -> None:
    sampling = Sampling(120, temperature=1.0, ignore_eos=True)
    prompts = PROMPTS[:2] + PROMPTS[3:]
    whole = as_lists(generate(engine, sampling, prompts))
    wanted = None if which is None else ids(4)[which]
    thread = threading.Timer(0.1, lambda: engine.abort(wanted))
    thread.start()
    done = generate(engine, sampling, prompts)
    thread.join()
    aborted = list(range(4)) if which is None else which
    assert [i for i, reason in enumerate(done.finish_reason.tolist()) if reason == ABORTED] == aborted
    for i, (response, full) in enumerate(zip(as_lists(done), whole, strict=True)):
        assert response == full[: len(response)]
        assert (len(response) < 120) == (i in aborted)
    assert as_lists(generate(engine, sampling, prompts)) == whole  # and nothing is left of it


def test_an_engine_asleep_gives_its_cache_back_and_wakes_as_it_was() -> None:
    decoder = tiny()
    engine = start(decoder, max_sequences=2000)  # a cache of 256 MB
    engine.update_weights(decoder.named_parameters(), 1)
    engine.sleep(), engine.wake()  # fills the cache with zeros, so that its memory is there
    expected = generate(engine, GREEDY, LONG)
    for level in (1, 2):
        before = psutil.Process().memory_info().rss
        engine.sleep(level)
        assert before - psutil.Process().memory_info().rss > 200e6
        with pytest.raises(SiirlError, match="asleep and cannot generate: wake it first"):
            generate(engine, GREEDY)
        engine.wake()
        assert_same(generate(engine, GREEDY, LONG), expected)


def test_the_process_is_left_as_it_was() -> None:
    def state() -> list[Any]:
        threads = torch.get_num_threads(), torch.set_num_threads
        numbers = torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())
        environment = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}
        return [*threads, *numbers, environment, torch.distributed.is_initialized(), torch.get_default_dtype()]

    before = state()
    decoder = tiny()
    engine = start(decoder)
    engine.update_weights(decoder.named_parameters(), 1)
    generate(engine, Sampling(5))
    assert state() == before


def test_options_of_the_back_end_reach_vllm() -> None:
    """Those that keep an NPU's weights in the layout that updates write, as its back end has them."""
    (npu,) = [spec.options for spec in NpuBackend.engines() if spec.name == "vllm"]
    injected = npu["additional_config"]

    class Vendor(CpuBackend):
        @classmethod
        def engines(cls) -> list[EngineSpec]:
            (own,) = [spec for spec in super().engines() if spec.name == "vllm"]
            return [
                EngineSpec("rollout", "vllm", {**own.options, "additional_config": {"rl_config": {"enabled": True}}})
            ]

    device = Vendor()
    device.load()
    assert start(tiny(), device)._engine.vllm_config.additional_config == injected == {"rl_config": {"enabled": True}}


class Nothing(CpuBackend):
    @classmethod
    def engines(cls) -> list[EngineSpec]:
        return [EngineSpec("rollout", "native"), EngineSpec("training", "fsdp")]


@pytest.mark.parametrize(
    ("decoder", "device", "message"),
    [
        (lambda: tiny(head_dim=8), None, r"takes heads of 32, 64, .* numbers, and this model's have 8"),
        (lambda: tiny("qwen2", num_heads=2), None, r"hidden size / heads = 64 numbers, and this one's have 32"),
        (lambda: tiny(max_positions=64), None, r"vLLM cannot start with this model here: .*128"),
        (lambda: tiny("qwen3_moe"), None, "vLLM does not take over new weights of a mixture of experts"),
        (tiny, Nothing(), "device 'cpu' runs no vLLM; set rollout.engine=native"),
    ],
    ids=["head size", "qwen2", "positions", "experts", "device"],
)
def test_what_vllm_cannot_run_is_refused_in_one_sentence(decoder: Any, device: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message) as refused:
        start(decoder(), device)
    assert "\n" not in str(refused.value)


def test_a_sequence_longer_than_the_engine_is_refused(engine: Any) -> None:
    with pytest.raises(RequestError, match="may have 207 tokens, and vLLM was started for 128"):
        generate(engine, Sampling(200))


@dataclass(frozen=True)
class Wider(Sampling):
    stop_ids: tuple[int, ...] = ()
    min_new_tokens: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    unheard_of: int = 3


def penalised(prompt: list[int], count: int, repetition: float, presence: float, frequency: float) -> list[int]:
    """Greedy decoding under the penalties of arXiv 1909.05858 (on prompt and response) and of OpenAI's API."""
    decoder = tiny()
    response: list[int] = []
    for _ in range(count):
        logits = forward_logits(decoder, prompt + response, torch.tensor([0]))[0]
        for token in {*prompt, *response}:
            logits[token] *= repetition if logits[token] < 0 else 1 / repetition
        for token in set(response):
            logits[token] -= presence + frequency * response.count(token)
        response.append(int(logits.argmax()))
    return response


@pytest.mark.parametrize("penalties", [(1.3, 0.0, 0.0), (1.0, 0.9, 0.0), (1.0, 0.0, 0.4), (1.2, 0.5, 0.3)])
@pytest.mark.parametrize("temperature", [0.0, 0.3])
def test_penalties_apply_to_the_logits_whatever_the_temperature(
    engine: Any, penalties: tuple[float, float, float], temperature: float
) -> None:
    names = ("repetition_penalty", "presence_penalty", "frequency_penalty")
    sampling = Wider(20, temperature, top_k=1, ignore_eos=False, **dict(zip(names, penalties, strict=True)))
    done = engine.generate(PROMPTS, ids(5), sampling, 1, 0)
    expected = [penalised(prompt, len(row), *penalties) for prompt, row in zip(PROMPTS, as_lists(done), strict=True)]
    assert as_lists(done) == expected
    assert as_lists(done) != as_lists(generate(engine, GREEDY))


def test_further_ends_and_a_least_length(engine: Any) -> None:
    free = as_lists(generate(engine, Sampling(20, temperature=0.0, ignore_eos=True)))
    end = free[0][2]
    done = generate(engine, Wider(20, 0.0, stop_ids=(end,)))
    first = free[0].index(end) + 1
    assert (as_lists(done)[0], int(done.finish_reason[0])) == (free[0][:first], STOP)
    late = generate(engine, Wider(20, 0.0, stop_ids=(end,), min_new_tokens=12), PROMPTS[:1])
    assert end not in as_lists(late)[0][:12]


def test_options_that_vllm_does_not_have_are_refused(engine: Any) -> None:
    with pytest.raises(RequestError, match="rollout.unheard_of is set, which rollout.engine 'vllm' does not have"):
        generate(engine, Wider(5, unheard_of=4))
    with pytest.raises(RequestError, match="ignore_eos and rollout.stop_ids are both set"):
        generate(engine, Wider(5, ignore_eos=True, stop_ids=(7,)))
