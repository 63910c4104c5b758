"""Losses of depth: hand-computed values, what they forgive, and pixels without a measure."""

from __future__ import annotations

import math

import pytest
import torch

from expedite_d2.d2.modeling.meta_arch.dpt_loss import (
    gradient_loss,
    scale_invariant_loss,
    stack_depths,
)


def test_scale_invariant_loss_by_hand() -> None:
    truth = torch.tensor([[[1.0, 2.0, 0.0, 4.0]]])
    prediction = torch.tensor([[[2.0, 2.0, 9.0, 8.0]]])
    # log ratios ln 2, 0, (no measure), ln 2.
    squares, mean = 2 * math.log(2) ** 2 / 3, 2 * math.log(2) / 3
    loss = scale_invariant_loss(prediction, truth, weight=0.5)
    assert loss.item() == pytest.approx(10 * math.sqrt(squares - 0.5 * mean**2), rel=1e-4)


def test_scale_invariant_loss_forgives_a_common_factor_as_far_as_its_weight_says() -> None:
    truth = torch.rand(2, 5, 6) + 1
    assert scale_invariant_loss(3 * truth, truth, weight=1.0).item() < 0.02
    full = scale_invariant_loss(3 * truth, truth, weight=0.0).item()
    assert full == pytest.approx(10 * math.log(3), rel=1e-4)


def test_gradient_loss_by_hand() -> None:
    truth = torch.ones(1, 2, 2)
    prediction = torch.tensor([[[1.0, math.e], [1.0, math.e]]])
    # Nothing changes downwards, 1 across.
    assert gradient_loss(prediction, truth, scales=1).item() == pytest.approx(1.0)
    # At half resolution there are no neighbours.
    assert gradient_loss(prediction, truth, scales=2).item() == pytest.approx(0.5)
    assert gradient_loss(5 * truth, truth).item() == pytest.approx(0.0)


@pytest.mark.parametrize("loss", [lambda p, t: scale_invariant_loss(p, t, 0.85), gradient_loss])
def test_losses_never_look_where_nothing_was_measured(loss) -> None:
    truth = torch.rand(1, 8, 8) + 1
    truth[:, 2:5] = 0
    prediction = (torch.rand(1, 8, 8) + 1).requires_grad_()
    value = loss(prediction, truth)
    (gradient,) = torch.autograd.grad(value, prediction)
    assert gradient.isfinite().all() and (gradient[:, 2:5] == 0).all()
    assert (gradient[:, 6] != 0).any()
    nothing = loss(prediction, torch.zeros(1, 8, 8))
    assert nothing.item() == 0
    (gradient,) = torch.autograd.grad(nothing, prediction)
    assert (gradient == 0).all()


def test_a_perfect_prediction_has_a_finite_slope() -> None:
    prediction = (torch.rand(1, 4, 4) + 1).requires_grad_()
    scale_invariant_loss(prediction, prediction.detach(), 0.85).backward()
    assert prediction.grad.isfinite().all()


def test_stack_depths_pads_with_nothing_and_leaves_out_what_is_too_far() -> None:
    depths = [torch.full((2, 3), 5.0), torch.full((4, 2), 90.0)]
    depths[1][0, 0] = 80.0
    stacked = stack_depths(depths, (4, 4), maximum=80.0)
    assert stacked.shape == (2, 4, 4)
    assert stacked[0].sum() == 30 and stacked[1].sum() == 80
