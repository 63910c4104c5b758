"""Tuning: which settings change a model's outputs least, and how fast they are on this device."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from expedite_d2 import adapters
from expedite_d2.adapters.registry import find_encoder
from expedite_d2.errors import needs_extra
from expedite_d2.ops._checks import real
from expedite_d2.reducers import Reduction
from expedite_d2.tools.budget import BUDGET, Costs, OutOfReach, Recipe
from expedite_d2.tools.calibrate import HELD_OUT, calibrate
from expedite_d2.tools.latency import Latency, time_call
from expedite_d2.tools.outputs import Select, call, checked, distance, evaluating, outputs_of
from expedite_d2.tools.tuning import Row, Tuning

#: Shares of the encoder's multiply-adds for which settings are tried, beside the budget.
SHARES = (0.8, 0.7, 0.6, 0.5, 0.4)
# Settings are calibrated on the other images, and judged on one of so many.
JUDGES = 3
# Timed passes with each settings, and as many of the plain model between them.
ROUNDS = 5


def tune(
    model: nn.Module,
    images: Iterable[Any],
    budget: float | None = None,
    *,
    max_error: float | None = None,
    size: tuple[int, int] | None = None,
    outputs: Select | None = None,
    progress: bool = True,
) -> Tuning:
    """Finds the settings that change a model's outputs least, without labels.

    Settings of every kind that the encoder takes are chosen by counted cost for 80 to 40 % of its
    multiply-adds, and calibrated on two thirds of the images. On the others the outputs are
    compared with those of the plain model, and the time is taken, in turn with the plain model. The
    model is left as it was.

    Args:
        model: the encoder, or a model that holds it.
        images: inputs of the model without labels, one per call; about 24, at least 3, and 5 for
            detail maps. A mapping is its keywords.
        budget: share of the encoder's multiply-adds that may be left, between 0 and 1; 0.7 by
            default. The settings within it of the least error are the best.
        max_error: instead of a budget, the largest error; the fastest settings within it are the
            best. The error is the relative distance (L2) of the outputs, mean over the images.
        size: height and width in pixels for which costs are counted; by default those of the first
            image that is a tensor, or else as for `expedite`.
        outputs: picks what is compared of what the model returns: tensors, in any nesting. By
            default all of it but hidden states, attentions and pooled features; of a model without
            a head its last hidden state.
        progress: whether to show a bar, which needs tqdm.

    Returns:
        What was measured. An interrupted tune (Ctrl-C) returns what it has measured until then.

    Raises:
        ValueError: no encoder of a known family, several, too few images, images with labels,
            outputs that cannot be compared, or a budget that cannot be reached.
        RuntimeError: out of memory.
    """
    adapters.expect_module(model)
    _check(budget, max_error)
    given = list(checked(images))
    if len(given) < JUDGES:
        raise ValueError(f"tune needs at least {JUDGES} images, got {len(given) or 'none'}")
    judged = given[JUDGES - 1 :: JUDGES]
    fitted = [image for number, image in enumerate(given) if number % JUDGES != JUDGES - 1]
    undo = adapters.remember(model)
    rows: list[Row] = []
    shares: dict[Reduction, float] = {}  # by the settings before they were calibrated
    try:
        adapters.restore(model)
        costs = Costs(model, _size_of(given[0]) if size is None else size)
        plan = _plan(costs, budget)
        with evaluating(model), _shown(plan, progress) as shown:
            encoder = find_encoder(model)[1]
            plain = [
                [out.cpu() for out in outputs_of(model, encoder, image, outputs)]
                for image in judged
            ]
            for recipe, most in shown:
                first = costs.meet(recipe, most)
                if shares.get(first, 1) <= most:  # a greater share came to the same settings
                    continue
                settings = _calibrated(model, costs, recipe, most, fitted, outputs)
                error = _error(model, encoder, judged, plain, outputs)
                times = _times(model, settings, judged)
                shares[first] = costs.share(settings)
                rows.append(Row(settings, shares[first], error, *times))
    except KeyboardInterrupt:
        if not rows:
            raise
        warnings.warn(
            f"tune was interrupted after {len(rows)} of {len(plan)} settings", stacklevel=2
        )
    except torch.OutOfMemoryError as error:
        raise RuntimeError(
            f"tune ran out of memory on {_device(model)}: smaller images, or fewer in each input, "
            "take less"
        ) from error
    finally:
        undo()
    return Tuning(type(model).__name__, str(_device(model)), tuple(rows), budget, max_error)


def _check(budget: float | None, max_error: float | None) -> None:
    if budget is not None and max_error is not None:
        raise ValueError("budget and max_error must not both be given")
    if budget is not None and ((share := real(budget)) is None or not 0 < share < 1):
        raise ValueError(f"budget must be a share between 0 and 1, got {budget!r}")
    if max_error is not None and ((most := real(max_error)) is None or not most > 0):
        raise ValueError(f"max_error must be a number greater than 0, got {max_error!r}")


def _plan(costs: Costs, budget: float | None) -> list[tuple[Recipe, float]]:
    """Returns the recipes and the shares of the multiply-adds for which settings are tried."""
    budgets = sorted({budget or BUDGET, *SHARES}, reverse=True)
    plan: list[tuple[Recipe, float]] = []
    refused: ValueError | None = None
    leasts: list[float] = []
    for recipe in dict.fromkeys(advice.recipe for advice in costs.recipes()):
        try:
            least = costs.least(recipe)
        except ValueError as error:  # the encoder does not take such steps
            refused = error
            continue
        leasts.append(least)
        plan += [(recipe, most) for most in budgets if most >= least]
    if not leasts:
        assert refused is not None
        raise refused
    most = budgets[0] if budget is None else budget
    if min(leasts) > most:
        raise ValueError(
            f"budget must be at least {min(leasts):.3f}, the least share that can be left, got "
            f"{most}"
        )
    return plan


def _calibrated(
    model: nn.Module,
    costs: Costs,
    recipe: Recipe,
    most: float,
    images: list[Any],
    select: Select | None,
) -> Reduction:
    """Expedites a model with calibrated settings of a cost, that of their detail maps included."""
    maps, spare = len(images) >= HELD_OUT, 0.0
    while True:
        try:
            chosen = costs.meet(recipe, most - spare)
        except OutOfReach:  # with what detail maps cost
            chosen, maps = costs.meet(recipe, most), False
        adapters.expedite(model, chosen)
        settings = calibrate(model, images, correction=maps, outputs=select)
        over = costs.share(settings) - most
        if over <= 0:
            return settings
        spare += over


def _error(
    model: nn.Module,
    encoder: nn.Module,
    images: list[Any],
    plain: list[list[Tensor]],
    select: Select | None,
) -> float:
    """Returns the mean distance of the outputs to the plain model's."""
    distances = []
    for image, expected in zip(images, plain, strict=True):
        found = [out.cpu() for out in outputs_of(model, encoder, image, select)]
        distances.append(distance(found, expected))
    return sum(distances) / len(distances)


def _times(model: nn.Module, settings: Reduction, images: list[Any]) -> tuple[Latency, Latency]:
    """Times a model with settings and without, in turn; the first round is not counted."""
    device = _device(model)
    plain: list[float] = []
    expedited: list[float] = []
    for number in range(1 + ROUNDS):
        image = images[number % len(images)]
        for times in (plain, expedited):
            if times is plain:
                adapters.restore(model)
            else:
                adapters.expedite(model, settings)
            times.append(time_call(partial(call, model, image), device)[1])
    return Latency.of(expedited[1:]), Latency.of(plain[1:])


def _device(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def _size_of(image: Any) -> tuple[int, int] | None:
    tensors = image.values() if isinstance(image, Mapping) else [image]
    for tensor in tensors:
        if isinstance(tensor, Tensor) and tensor.dim() == 4:
            return tensor.shape[-2], tensor.shape[-1]
    return None


def _shown(plan: list[Any], progress: bool) -> Any:
    if not progress:
        return nullcontext(plan)
    with needs_extra("tune"):
        from tqdm import tqdm
    return tqdm(plan, desc="tuning", unit="settings")
