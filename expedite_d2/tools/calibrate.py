"""Calibration: settings that are measured on a few unlabelled images."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from expedite_d2.adapters.core import expedited_encoders
from expedite_d2.ops import Reduced
from expedite_d2.ops.observe import ObservedOperator
from expedite_d2.reducers import Reduction
from expedite_d2.reducers.cluster import sharpness


@torch.no_grad()
def calibrate(model: nn.Module, images: Iterable[Any]) -> Reduction:
    """Measures the temperature on a few images and stores it in the encoder's settings.

    The images pass through the model with the automatic temperature, which measures the spread
    of the tokens in each clustering.

    Args:
        model: is or holds one expedited encoder: a backbone of this project, or a model that
            was given to `expedite`.
        images: inputs of the model, one per call.

    Returns:
        The new settings of the encoder, with the temperature c / T, T being the mean over all
        images.

    Raises:
        ValueError: no expedited encoder or several, no images, or none that was clustered.
    """
    encoder = _expedited_encoder(model)
    reduction: Reduction = encoder.reduction
    training = {module: module.training for module in model.modules()}
    calls = 0
    observed = ObservedOperator(
        torch.ops.expedite_d2.token_reduce.default,
        lambda arguments, result: (sharpness(arguments["window"]), Reduced(*result).spread),
    )
    try:
        model.eval()
        encoder.reduction = reduction.with_temperature(0.0)
        # torch.compile refuses to run under a function mode.
        with torch.compiler.set_stance("force_eager"), observed:
            for image in images:
                model(image)
                calls += 1
    finally:
        encoder.reduction = reduction
        for module, mode in training.items():
            module.training = mode
    if not calls:
        raise ValueError("calibrate needs at least one image, got none")
    if not observed.kept:
        raise ValueError(
            f"calibrate needs an image with more tokens than clusters, got none among {calls}"
        )
    c = observed.kept[0][0]
    spreads = torch.cat([spread for _, spread in observed.kept])
    encoder.reduction = reduction.with_temperature(c / spreads.double().mean().item())
    return encoder.reduction


def _expedited_encoder(model: nn.Module) -> Any:
    encoders = expedited_encoders(model)
    if len(encoders) != 1:
        raise ValueError(
            f"calibrate expects a model with one expedited encoder, got {len(encoders)} in "
            f"{type(model).__name__}"
        )
    return next(iter(encoders.values()))
