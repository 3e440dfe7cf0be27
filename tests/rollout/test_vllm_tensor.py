"""Two workers that compute one model with vLLM: every weight reaches its shard."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from siirl.device import Collectives, current
from siirl.rollout.sampling import Sampling
from tests.device.world import run_world
from tests.rollout import test_vllm

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed here: make test-vllm"),
]

SEEDS = (2, 3)


def on_two(rank: int, size: int) -> list[tuple[list[list[int]], list[float]]]:
    """Responses and log-probs after each of two updates."""
    from siirl.rollout.vllm import VllmEngine, VllmSize

    world = Collectives.init(current(), rank, size, timeout_s=120)
    decoder = test_vllm.tiny(tie_embeddings=False)
    engine = VllmEngine(decoder, [1], test_vllm.text, current(), torch.float32, VllmSize(128, 64, 2**26), tensor=size)
    found = []
    for version, seed in enumerate(SEEDS, start=1):
        engine.update_weights(test_vllm.tiny(seed=seed, tie_embeddings=False).named_parameters(), version)
        done = test_vllm.generate(engine, test_vllm.GREEDY)
        found.append((test_vllm.as_lists(done), done.log_probs.values.tolist()))
    assert world.all_reduce(torch.tensor([rank]), "sum").item() == 1  # the run's own group still works
    return found


@pytest.mark.slow
def test_every_layout_of_the_weights_is_updated() -> None:
    ranks = run_world(on_two, 2)
    assert ranks[0] == ranks[1]
    for seed, (responses, log_probs) in zip(SEEDS, ranks[0], strict=True):
        expected = test_vllm.native(test_vllm.tiny(seed=seed, tie_embeddings=False), Sampling(20, temperature=0.0))
        assert responses == test_vllm.as_lists(expected)
        torch.testing.assert_close(torch.tensor(log_probs), expected.log_probs.values, atol=test_vllm.BOUND, rtol=0)
