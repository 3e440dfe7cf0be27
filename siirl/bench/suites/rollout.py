"""Generation: `NativeEngine` against `siirl.bench.plain.generate`, drawing as many tokens from the same model.

The reference computes each response's prompt anew, where the engine computes a group's once.
"""

from __future__ import annotations

import pytest
import torch

from siirl.bench import plain, setting
from siirl.bench.measure import Measure, Rate
from siirl.device.backend import Backend
from siirl.rollout.engine import NativeEngine
from siirl.rollout.graphs import recorder
from siirl.rollout.sampling import Sampling

NEW_TOKENS = 24


@pytest.mark.parametrize(("prompts", "group", "prompt"), [(4, 4, 32), (2, 8, 128)], ids=["4x4 of 32", "2x8 of 128"])
def bench_generate(measure: Measure, backend: Backend, prompts: int, group: int, prompt: int) -> None:
    decoder = setting.decoder(backend).requires_grad_(False)
    engine = NativeEngine(decoder, [setting.END], lambda ids: "", cache_bytes=2**28, capture=recorder(backend, True))
    tokens, rows = setting.random_tokens(prompts, prompt), prompts * group
    lists, ids = tokens.tolist(), torch.arange(rows)
    sampling = Sampling(NEW_TOKENS, ignore_eos=True)
    model, padded = plain.PlainDecoder(decoder), tokens.repeat_interleave(group, 0).to(backend.device())
    measure(
        lambda: engine.generate(lists, ids, sampling, group, seed=0),
        lambda: plain.generate(model, padded, NEW_TOKENS, forbidden=setting.END),
        Rate(rows * NEW_TOKENS, "tokens"),
        against="plain PyTorch, prompts computed for each response",
        pairs=20,
    )
