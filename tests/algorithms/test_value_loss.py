from __future__ import annotations

import pytest
import torch

from siirl.algorithms.value_loss import value_loss


def test_the_clipped_loss_by_hand():
    # Old value 0, clip 0.5: V = 0.25 is inside, V = 2 clips to 0.5: for R = 3 max(1, 6.25)/2, for R = 0 max(4, 0.25)/2.
    values, returns = torch.tensor([0.25, 2.0, 2.0, -2.0]), torch.tensor([1.0, 3.0, 0.0, -3.0])
    loss, clipped = value_loss(values, torch.zeros(4), returns, clip=0.5)
    assert loss.tolist() == [0.28125, 3.125, 2.0, 3.125]
    assert clipped.tolist() == [0, 1, 0, 1]


def test_without_a_clip_it_is_half_the_squared_error():
    generator = torch.Generator().manual_seed(0)
    values, old, returns = torch.randn(3, 50, generator=generator)
    loss, clipped = value_loss(values, old, returns, clip=None)
    torch.testing.assert_close(loss, torch.nn.functional.mse_loss(values, returns, reduction="none") / 2)
    torch.testing.assert_close(value_loss(values, old, returns, clip=1e6)[0], loss)
    assert not clipped.any()


def test_a_value_inside_the_range_is_not_clipped():
    # old + clip(V - old) is V only up to rounding, and the rounding would count as a clip.
    values, noise = torch.randn(2, 1000, generator=torch.Generator().manual_seed(1))
    assert not value_loss(values, values - 0.01 * noise, torch.zeros(1000), clip=0.2)[1].any()
    assert not value_loss(values, values.clone(), torch.zeros(1000), clip=0.0)[1].any()


@pytest.mark.parametrize("clip", [None, 0.3])
def test_gradients_agree_with_finite_differences_away_from_kinks(clip):
    generator = torch.Generator().manual_seed(2)
    values, old, returns = torch.randn(3, 200, generator=generator, dtype=torch.float64)
    moved = (values - old).abs()
    # Kinks: the edge of the range, and outside it where V and its clipped value are equally far from the return.
    tie = ((values - returns).abs() - (values.clamp(old - 0.3, old + 0.3) - returns).abs()).abs()
    smooth = ((moved - 0.3).abs() > 1e-3) & ((moved < 0.3) | (tie > 1e-3))
    assert smooth.sum() > 150
    values, old, returns = values[smooth], old[smooth], returns[smooth]
    assert torch.autograd.gradcheck(lambda v: value_loss(v, old, returns, clip)[0], (values.requires_grad_(),))
