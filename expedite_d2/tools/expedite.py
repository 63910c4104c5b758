"""`expedite` and `expedited`: the one line for a model that somebody has."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn

from expedite_d2 import adapters
from expedite_d2.ops._checks import real
from expedite_d2.reducers import Cluster, Merge, Reconstruction, Reduction
from expedite_d2.tools.budget import choose

Model = TypeVar("Model", bound=nn.Module)


def expedite(
    model: Model,
    reduction: Reduction | None = None,
    *,
    budget: float | None = None,
    size: tuple[int, int] | None = None,
    alpha: int | None = None,
    clusters: tuple[int, int] | tuple[float, float] | None = None,
    iterations: int | None = None,
    neighbourhood: int | None = None,
    topk: int | None = None,
    temperature: float | None = None,
    reconstruction: Reconstruction | None = None,
    encoder: str | None = None,
    outputs: Collection[int] | None = None,
) -> Model:
    """Makes the last blocks of a model's encoder run on fewer tokens, in place.

    No parameter is added, removed or changed, and the state dict stays the same; a model that is
    loaded from it is the plain one. Detail maps, which `calibrate` fits, are buffers outside of the
    state dict. Expediting again replaces the settings, which are the encoder's attribute
    `reduction`. What a library returns beside the features, such as attention maps, has the size of
    the reduced tokens in the blocks that run on these.

    Settings are chosen by counted multiply-adds, unless they are given: by a `reduction`, or by
    `alpha`, `clusters` and so on. `describe` tells what was chosen.

    Args:
        model: the encoder, or a model that holds it.
        reduction: all settings in one value.
        budget: share of the encoder's multiply-adds that may be left, between 0 and 1; by default
            0.7, or the nearest that can be reached.
        size: height and width in pixels of the images for which settings are chosen; by default
            those that the encoder is configured for, or 512x512. Any other size runs, too.
        alpha: of a `Cluster`: number of blocks that run at full resolution before the clustering.
        clusters: rows and columns of clusters, or ratios of them.
        iterations: rounds of soft k-means; 5 by default.
        neighbourhood: side length, in cells, of the square of candidate cells around a token's home
            cell; odd, 5 by default.
        topk: number of centres that each token is reconstructed from; 4 by default.
        temperature: factor of squared distances; 0.0, the default, measures it for each image.
        reconstruction: "residual" (default) or "replace".
        encoder: name of the encoder among the model's modules, where it holds several.
        outputs: numbers of the blocks whose outputs are read. The outputs of these and of the last
            block have full resolution; with none, `()`, even the last stays on the clusters, see
            `clustering_of`. None for all outputs that the model may read.

    Returns:
        The model.

    Raises:
        ValueError: no encoder of a known family, several, settings that do not fit it, settings
            of two kinds, or a budget that cannot be reached.
    """
    owner = _named(model, encoder)
    keywords = {
        "alpha": alpha,
        "clusters": clusters,
        "iterations": iterations,
        "neighbourhood": neighbourhood,
        "topk": topk,
        "temperature": temperature,
        "reconstruction": reconstruction,
    }
    given = {name: value for name, value in keywords.items() if value is not None}
    if reduction is None and not given:
        if budget is not None and ((share := real(budget)) is None or not 0 < share < 1):
            raise ValueError(f"budget must be a share between 0 and 1, got {budget!r}")
        reduction = choose(owner, budget, size)
    elif budget is not None or size is not None:
        beside = "budget" if budget is not None else "size"
        raise ValueError(f"{beside} must be left out where the settings themselves are given")
    adapters.expedite(owner, _settings(reduction, given), outputs)
    return model


@contextmanager
def expedited(
    model: Model,
    reduction: Reduction | None = None,
    *,
    encoder: str | None = None,
    **settings: Any,
) -> Iterator[Model]:
    """A context in which a model is expedited.

    After it, also after an exception, the model has the settings that it had before, or none.
    Contexts may be nested.

    Args:
        model: see `expedite`.
        reduction: see `expedite`.
        encoder: see `expedite`.
        settings: the other arguments of `expedite`.

    Yields:
        The model.

    Raises:
        ValueError: see `expedite`.
    """
    undo = adapters.remember(_named(model, encoder))
    expedite(model, reduction, encoder=encoder, **settings)
    try:
        yield model
    finally:
        undo()


def _named(model: nn.Module, encoder: str | None) -> nn.Module:
    """Returns the part of a model with a name, or the model itself."""
    adapters.expect_module(model)
    if encoder is None:
        return model
    modules = dict(model.named_modules())
    if encoder not in modules:
        raise ValueError(
            f"encoder must be the name of a module of {type(model).__name__}, got {encoder!r}"
        )
    return modules[encoder]


def _settings(reduction: Any, given: dict[str, Any]) -> Reduction:
    """Makes one value of the settings that `expedite` was given."""
    if reduction is not None:
        if isinstance(reduction, (Cluster, Merge)):
            raise ValueError(
                f"reduction must be a Reduction, such as Reduction(Cluster(...)), got {reduction!r}"
            )
        if not isinstance(reduction, Reduction):
            raise ValueError(
                f"reduction must be a Reduction (alpha and clusters go by keyword), got "
                f"{reduction!r}"
            )
        if given:
            raise ValueError(
                f"settings must be a reduction or keywords, got a reduction and {', '.join(given)}"
            )
        return reduction
    missing = [name for name in ("alpha", "clusters") if name not in given]
    if missing:
        raise ValueError(f"expedite needs a reduction, or {' and '.join(missing)}")
    reconstruction = given.pop("reconstruction", "residual")
    at, grid = given.pop("alpha"), given.pop("clusters")
    return Reduction((Cluster(at, grid, **given),), reconstruction)
