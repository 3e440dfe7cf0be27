"""Each option of sampling does what its definition says, in whole responses."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from siirl.model.decoder import Decoder, PackedAttention
from siirl.rollout.contract import STOP
from siirl.rollout.sampling import Sampling
from siirl_kernels.packing import PackedSequences
from tests.device_under_test import device
from tests.rollout.test_engine import as_lists, engine, tiny

PROMPT = [11, 12, 13, 12, 11]


def responses(sampling: Sampling, count: int = 1, prompt: list[int] = PROMPT):
    return engine(tiny()).generate([prompt], torch.arange(count), sampling, count, 0)


def next_logits(decoder: Decoder, tokens: list[int]) -> torch.Tensor:
    sequence = PackedSequences((len(tokens),), device())
    with torch.no_grad():
        hidden = decoder(torch.tensor(tokens, device=device()), sequence.positions, PackedAttention(sequence))
        return decoder.logits(hidden[-1:])[0].cpu()


@pytest.mark.parametrize(
    ("repetition", "presence", "frequency"), [(1.7, 0.0, 0.0), (1.0, 1.5, 0.0), (1.0, 0.0, 0.8), (1.3, 0.5, 0.25)]
)
def test_penalties_are_those_of_their_definitions(repetition: float, presence: float, frequency: float) -> None:
    """Worked out token by token in plain Python, from the definitions of vLLM's documentation."""
    options = {
        "repetition_penalty": repetition,
        "presence_penalty": presence,
        "frequency_penalty": frequency,
    }
    (response,) = as_lists(responses(Sampling(25, temperature=0.0, ignore_eos=True, **options)))
    decoder, drawn = tiny(), []
    for token in response:
        logits = next_logits(decoder, PROMPT + drawn).tolist()
        for seen in set(PROMPT + drawn):
            logits[seen] = logits[seen] / repetition if logits[seen] > 0 else logits[seen] * repetition
        for seen in set(drawn):
            logits[seen] -= presence + frequency * drawn.count(seen)
        logits[1] = float("-inf")  # the end token
        assert token == max(range(99), key=logits.__getitem__)
        drawn.append(token)
    assert response != as_lists(responses(Sampling(25, temperature=0.0, ignore_eos=True)))[0]


def test_no_end_token_is_drawn_before_its_time() -> None:
    done = responses(Sampling(40, temperature=2.0, min_new_tokens=12, stop_ids=(30, 31)), 64)
    lengths = done.response_ids.lengths
    assert int(lengths.min()) >= 13 > int(responses(Sampling(40, temperature=2.0), 64).response_ids.lengths.min())
    for row in as_lists(done):
        assert not {1, 30, 31} & set(row[:12])


def test_stop_ids_end_a_response_and_end_tokens_still_do() -> None:
    done = responses(Sampling(60, temperature=2.0, stop_ids=(30, 31)), 64)
    last = {row[-1] for row, reason in zip(as_lists(done), done.finish_reason.tolist(), strict=True) if reason == STOP}
    assert last == {1, 30, 31}
    assert all(not {1, 30, 31} & set(row[:-1]) for row in as_lists(done))


def test_bad_words_are_not_in_any_response_and_their_parts_are() -> None:
    free = as_lists(responses(Sampling(60, temperature=1.0, ignore_eos=True), 32))
    pairs = [pair for row in free for pair in pairwise(row)]
    common = max(set(pairs), key=pairs.count)
    single = max(set(sum(free, [])) - set(common), key=sum(free, []).count)
    rows = as_lists(responses(Sampling(60, temperature=1.0, ignore_eos=True, bad_words=(common, (single,))), 32))
    assert all(common not in list(pairwise(row)) and single not in row for row in rows)
    assert all(any(token in row for row in rows) for token in common)


def test_the_likeliest_tokens_come_with_each_token() -> None:
    decoder = tiny()
    done = responses(Sampling(10, temperature=0.7, ignore_eos=True, top_log_probs=3))
    drawn: list[int] = []
    for place, token in enumerate(as_lists(done)[0]):
        expected = torch.log_softmax(next_logits(decoder, PROMPT + drawn) / 0.7, -1).topk(3)
        assert done.top_ids[place].tolist() == expected.indices.tolist()
        torch.testing.assert_close(done.top_log_probs[place], expected.values, atol=1e-5, rtol=0)
        drawn.append(token)


def test_options_and_guesses_together_draw_the_same() -> None:
    options = {"temperature": 0.5, "presence_penalty": 0.4, "min_new_tokens": 8, "top_p": 0.9, "bad_words": ((20, 21),)}
    plain = as_lists(responses(Sampling(40, **options), 8))
    assert plain == as_lists(responses(Sampling(40, **options, draft_tokens=3, draft_match=1), 8))
