from __future__ import annotations

import pytest
import torch

from siirl.algorithms.aggregation import token_weights
from siirl.data.batch import Ragged, offsets_of
from siirl.errors import RequestError

MODES = ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]
MAX_LENGTH = 10


def counts(lengths: torch.Tensor, valid: torch.Tensor) -> dict[str, int]:
    return {"global_tokens": int(lengths[valid].sum()), "global_sequences": int(valid.sum()), "max_length": MAX_LENGTH}


def plain_loss(mode: str, rows: list[torch.Tensor]) -> torch.Tensor:
    """The definitions, over a list of valid responses."""
    if mode == "token-mean":
        return torch.cat(rows).mean()
    per_row = {
        "seq-mean-token-sum": lambda row: row.sum(),
        "seq-mean-token-mean": lambda row: row.mean(),
        "seq-mean-token-sum-norm": lambda row: row.sum() / MAX_LENGTH,
    }[mode]
    return torch.stack([per_row(row) for row in rows]).mean()


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("token-mean", [1 / 4] * 4),
        ("seq-mean-token-sum", [1 / 2] * 4),
        ("seq-mean-token-mean", [1 / 2] + [1 / 6] * 3),
        ("seq-mean-token-sum-norm", [1 / 20] * 4),
    ],
)
def test_weights_by_hand(mode, expected):
    lengths, valid = torch.tensor([1, 2, 3]), torch.tensor([True, False, True])
    weights = token_weights(mode, lengths, valid, **counts(lengths, valid))
    torch.testing.assert_close(weights, torch.tensor([expected[0], 0.0, 0.0, *expected[1:]]))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", range(5))
def test_any_split_into_workers_and_micro_batches_sums_to_the_loss_of_the_whole(mode, seed):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, MAX_LENGTH + 1, (23,), generator=generator)
    valid = torch.rand(23, generator=generator) > 0.3
    losses = Ragged(torch.randn(int(lengths.sum()), generator=generator), offsets_of(lengths))
    whole = plain_loss(mode, [row for row, ok in zip(losses.rows(), valid.tolist(), strict=True) if ok])
    order = torch.randperm(23, generator=generator)
    for cuts in ([], [11], [1, 2, 9, 20], list(range(1, 23))):
        total = 0.0
        for part in torch.tensor_split(order, cuts):
            weights = token_weights(mode, lengths[part], valid[part], **counts(lengths, valid))
            total += (weights * losses.take(part).values).sum().item()
        assert total == pytest.approx(whole.item(), abs=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_a_failed_row_adds_nothing_and_an_empty_one_counts_as_a_sequence(mode):
    lengths, valid = torch.tensor([0, 4, 2]), torch.tensor([True, True, False])
    weights = token_weights(mode, lengths, valid, **counts(lengths, valid))
    total = {"token-mean": 1.0, "seq-mean-token-sum": 2.0, "seq-mean-token-mean": 0.5, "seq-mean-token-sum-norm": 0.2}
    assert weights.sum().item() == pytest.approx(total[mode])
    assert weights[4:].tolist() == [0, 0]


@pytest.mark.parametrize("mode", MODES)
def test_with_everything_failed_or_nothing_here_weights_are_zero_or_absent(mode):
    lengths, valid = torch.tensor([2, 0, 1]), torch.zeros(3, dtype=torch.bool)
    assert token_weights(mode, lengths, valid, **counts(lengths, valid)).tolist() == [0, 0, 0]
    assert token_weights(mode, lengths[:0], valid[:0], **counts(lengths, ~valid)).shape == (0,)


def test_an_unknown_mode_is_a_request_error():
    with pytest.raises(RequestError, match="algorithm.loss_agg: .* did you mean 'token-mean'"):
        token_weights("token_mean", torch.tensor([1]), torch.tensor([True]), **counts(torch.ones(1), torch.ones(1) > 0))
