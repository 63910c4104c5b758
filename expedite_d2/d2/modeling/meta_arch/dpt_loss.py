"""Losses of monocular depth, on logarithms, which depend on the ratio of two depths."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Keeps the slope of the root finite for a perfect prediction.
_TINY = 1e-6


def scale_invariant_loss(prediction: Tensor, truth: Tensor, weight: float) -> Tensor:
    """Computes Eigen's scale-invariant error, as a root times 10, as in BTS and AdaBins.

    10 · sqrt(mean(g²) - weight · mean(g)²) with g = log prediction - log truth; the weight is
    the share of a common factor that is not penalised.

    Args:
        prediction: (B, h, w) metres, positive.
        truth: (B, h, w) metres; 0 where nothing was measured.
        weight: in [0, 1].

    Returns:
        A scalar; 0 if there is no truth.
    """
    valid = truth > 0
    difference = _log_difference(prediction, truth, valid)
    count = valid.sum().clamp(min=1)
    mean = difference.sum() / count
    error = difference.square().sum() / count - weight * mean.square()
    return 10 * (error.clamp(min=0) + _TINY).sqrt() * valid.any()


def gradient_loss(prediction: Tensor, truth: Tensor, scales: int = 4) -> Tensor:
    """Computes MiDaS' gradient matching: mean |difference of g| of neighbours, at several scales.

    It makes depth edges sharp and surfaces smooth.

    Args:
        prediction: (B, h, w) metres, positive.
        truth: (B, h, w) metres; 0 where nothing was measured.
        scales: number of resolutions, each half of the one before.

    Returns:
        A scalar; 0 if no two neighbours have a truth.
    """
    valid = truth > 0
    difference = _log_difference(prediction, truth, valid)
    total = difference.new_zeros(())
    for step in (2**k for k in range(scales)):
        g, known = difference[:, ::step, ::step], valid[:, ::step, ::step]
        down = known[:, 1:] & known[:, :-1]
        across = known[:, :, 1:] & known[:, :, :-1]
        change = (g[:, 1:] - g[:, :-1]).abs() * down
        total = total + change.sum() / down.sum().clamp(min=1)
        change = (g[:, :, 1:] - g[:, :, :-1]).abs() * across
        total = total + change.sum() / across.sum().clamp(min=1)
    return total / scales


def stack_depths(depths: list[Tensor], size: tuple[int, int], maximum: float) -> Tensor:
    """Stacks the ground truth of a batch, padded like its images.

    Args:
        depths: of each image (h, w) metres; 0 where nothing was measured.
        size: height and width of the batch.
        maximum: greater depths are ignored.

    Returns:
        (B, *size), 0 in the padding.
    """
    padded = [F.pad(d, (0, size[1] - d.shape[1], 0, size[0] - d.shape[0])) for d in depths]
    stacked = torch.stack(padded)
    return stacked * (stacked <= maximum)


def _log_difference(prediction: Tensor, truth: Tensor, valid: Tensor) -> Tensor:
    """Returns log prediction - log truth, 0 where there is no truth."""
    one = truth.new_ones(())
    return torch.where(valid, prediction, one).log() - torch.where(valid, truth, one).log()
