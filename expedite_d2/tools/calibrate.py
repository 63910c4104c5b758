"""Calibration: settings that are measured on a few unlabelled images."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from expedite_d2.adapters.core import expedited_encoders
from expedite_d2.ops import Reduced
from expedite_d2.ops.observe import ObservedOperator
from expedite_d2.reducers import Cluster, Reduction
from expedite_d2.reducers.cluster import sharpness
from expedite_d2.tools.detail_maps import DetailMaps, Subject
from expedite_d2.tools.outputs import (
    Select,
    call,
    checked,
    distance,
    evaluating,
    outputs_of,
)

# One image of so many is not fitted to, and decides whether a correction is kept.
HELD_OUT = 4


def calibrate(
    model: nn.Module,
    images: Iterable[Any],
    *,
    temperature: bool = True,
    correction: bool = True,
    outputs: Select | None = None,
) -> Reduction:
    """Measures settings on a few unlabelled images, and stores them in the encoder.

    Nothing is trained: the temperature is a mean over the tokens, and the detail maps of the
    correction are linear regressions of what the blocks add to the tokens' own detail.

    Args:
        model: is or holds one expedited encoder: a backbone of this project, or a model that
            was given to `expedite`.
        images: inputs of the model without labels, one per call; about 16. A mapping is its
            keywords.
        temperature: whether to measure the temperature of a Cluster: c / T, T being the mean over
            all images of their spreads.
        correction: whether to fit detail maps. They are kept if they bring the model's outputs
            nearer to those of the plain model on every fourth image, which they are not fitted to:
            with fewer than four images there are none. The reconstruction "replace" has none, and
            grouped attention (rounds > 0) gets none.
        outputs: picks what is compared of what the model returns: tensors, in any nesting. By
            default all of it but hidden states, attentions and pooled features; of a model without
            a head its last hidden state.

    Returns:
        The new settings of the encoder.

    Raises:
        ValueError: no expedited encoder or several; no images, or none that was reduced; paths,
            images without a batch axis or with labels; outputs that cannot be compared.
    """
    encoder = _expedited_encoder(model)
    subject = Subject(encoder)
    before = subject.reduction
    settings = replace(before, correction=None)
    given: list[Any] = []
    with evaluating(model):
        try:
            if temperature and isinstance(settings.steps[0], Cluster):
                subject.reduction = settings.with_temperature(0.0)
                with _observed_spreads() as spreads:
                    for image in checked(images):
                        call(model, image)
                        given.append(image)
                settings = settings.with_temperature(_temperature(spreads, len(given)))
            else:
                given += checked(images)
            if not given:
                raise ValueError("calibrate needs at least one image, got none")
            subject.reduction = settings
            if correction and _takes_correction(settings):
                settings = _corrected(model, encoder, subject, given, outputs)
        except BaseException:
            subject.reduction = before
            raise
    subject.reduction = settings
    return settings


def _observed_spreads() -> ObservedOperator:
    """A context that records c and T of each clustering with the automatic temperature."""
    return ObservedOperator(
        torch.ops.expedite_d2.token_reduce.default,
        lambda arguments, result: (sharpness(arguments["window"]), Reduced(*result).spread),
    )


def _temperature(observed: ObservedOperator, images: int) -> float:
    """Returns c / T, T being the mean over all images."""
    if not images:
        raise ValueError("calibrate needs at least one image, got none")
    if not observed.kept:
        raise ValueError(
            f"calibrate needs an image with more tokens than clusters, got none among {images}"
        )
    spreads = torch.cat([spread for _, spread in observed.kept])
    spread = spreads.double().mean().item()
    if not math.isfinite(spread):
        raise ValueError("images must give finite tokens, got NaN or infinity")
    return observed.kept[0][0] / spread


def _takes_correction(settings: Reduction) -> bool:
    grouped = any(getattr(step, "rounds", 0) for step in settings.steps)
    return settings.reconstruction == "residual" and not grouped


def _corrected(
    model: nn.Module,
    encoder: nn.Module,
    subject: Subject,
    images: list[Any],
    select: Select | None,
) -> Reduction:
    """Returns the encoder's settings with detail maps, if these help on images held out."""
    settings = subject.reduction
    if not subject.numbers:  # nothing is reconstructed: the model's head runs on clusters
        return settings
    if len(images) < HELD_OUT:
        warnings.warn(
            f"detail maps need at least {HELD_OUT} images, got {len(images)}: none is fitted",
            stacklevel=3,
        )
        return settings
    held_out = images[HELD_OUT - 1 :: HELD_OUT]
    fitted = [image for i, image in enumerate(images) if i % HELD_OUT != HELD_OUT - 1]
    maps = DetailMaps(subject, subject.read(partial(call, model, fitted[0])))
    for image in fitted:
        maps.add(partial(call, model, image))
    if not maps.images:
        raise ValueError(f"calibrate needs an image that is reduced, got none among {len(fitted)}")
    corrected = replace(settings, correction=maps.solve())
    distances = [0.0, 0.0]
    for image in held_out:
        with subject.plain():
            expected = outputs_of(model, encoder, image, select)
        for number, reduction in enumerate((settings, corrected)):
            subject.reduction = reduction
            distances[number] += distance(outputs_of(model, encoder, image, select), expected)
    return corrected if distances[1] < distances[0] else settings


def _expedited_encoder(model: nn.Module) -> Any:
    encoders = expedited_encoders(model)
    if len(encoders) != 1:
        raise ValueError(
            f"calibrate expects a model with one expedited encoder, got {len(encoders)} in "
            f"{type(model).__name__}"
        )
    return next(iter(encoders.values()))
