"""`expedite` and `expedited`: the one line for a model that somebody has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn

from expedite_d2 import adapters
from expedite_d2.ops._checks import real
from expedite_d2.reducers import Reduction
from expedite_d2.tools.budget import choose

Model = TypeVar("Model", bound=nn.Module)


def expedite(
    model: Model,
    reduction: Reduction | None = None,
    *,
    budget: float | None = None,
    size: tuple[int, int] | None = None,
    **settings: Any,
) -> Model:
    """Makes the last blocks of a model's encoder run on fewer tokens, in place.

    No parameter or buffer is added, removed or changed, and the state dict stays the same; a model
    that is loaded from it is the plain one. Expediting again replaces the settings, which are the
    encoder's attribute `reduction`. What a library returns beside the features, such as attention
    maps, has the size of the reduced tokens in the blocks that run on these.

    Settings are chosen by counted multiply-adds, unless they are given: by a `reduction`, or by
    `alpha`, `clusters` and so on. `describe` tells what was chosen.

    Args:
        model: the encoder, or a model that holds it.
        reduction: all settings in one value.
        budget: share of the encoder's multiply-adds that may be left, between 0 and 1; by default
            0.7, or the nearest that can be reached.
        size: height and width in pixels of the images for which settings are chosen; by default
            those that the encoder is configured for, or 512x512. Any other size runs, too.
        settings: those of one `Cluster` and `outputs`, as `adapters.expedite` has them.

    Returns:
        The model.

    Raises:
        ValueError: no encoder of a known family, several, settings that do not fit it, settings
            of two kinds, or a budget that cannot be reached.
    """
    outputs = settings.pop("outputs", None)
    if reduction is None and not any(value is not None for value in settings.values()):
        adapters.expect_module(model)
        if budget is not None and ((share := real(budget)) is None or not 0 < share < 1):
            raise ValueError(f"budget must be a share between 0 and 1, got {budget!r}")
        reduction = choose(model, budget, size)
    elif budget is not None or size is not None:
        beside = "budget" if budget is not None else "size"
        raise ValueError(f"{beside} must be left out where the settings themselves are given")
    return adapters.expedite(model, reduction, outputs=outputs, **settings)


@contextmanager
def expedited(model: Model, reduction: Reduction | None = None, **settings: Any) -> Iterator[Model]:
    """A context in which a model is expedited.

    After it, also after an exception, the model has the settings that it had before, or none.
    Contexts may be nested.

    Args:
        model: see `expedite`.
        reduction: see `expedite`.
        settings: the other arguments of `expedite`.

    Yields:
        The model.

    Raises:
        ValueError: see `expedite`.
    """
    undo = adapters.remember(model)
    expedite(model, reduction, **settings)
    try:
        yield model
    finally:
        undo()
