"""`expedite` with given settings, `restore` and `is_expedited`."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, TypeVar

from torch import nn

from expedite_d2.adapters.fit import fit
from expedite_d2.adapters.hourglass import ATTRIBUTE, Hourglass
from expedite_d2.adapters.registry import find_encoder
from expedite_d2.reducers import Cluster, Expeditable, Merge, Reconstruction, Reduction

Model = TypeVar("Model", bound=nn.Module)


def expedite(
    model: Model,
    reduction: Reduction | None = None,
    *,
    alpha: int | None = None,
    clusters: tuple[int, int] | tuple[float, float] | None = None,
    iterations: int | None = None,
    neighbourhood: int | None = None,
    topk: int | None = None,
    temperature: float | None = None,
    reconstruction: Reconstruction | None = None,
    outputs: Collection[int] | None = None,
) -> Model:
    """Makes the last blocks of a model's encoder run on clusters of its tokens, in place.

    No parameter or buffer is added, removed or changed, and the state dict stays the same; a model
    that is loaded from it is the plain one. Expediting again replaces the settings, which are the
    encoder's attribute `reduction`. What a library returns beside the features, such as attention
    maps, has the size of the clusters in the blocks that run on clusters.

    Args:
        model: the encoder, or a model that holds it.
        reduction: all settings in one value; or, by keyword, those of one `Cluster`:
        alpha: number of blocks that run at full resolution before the clustering.
        clusters: rows and columns of clusters, or ratios of them.
        iterations: rounds of soft k-means; 5 by default.
        neighbourhood: side length, in cells, of the square of candidate cells around a token's home
            cell; odd, 5 by default.
        topk: number of centres that each token is reconstructed from; 4 by default.
        temperature: factor of squared distances; 0.0, the default, measures it for each image.
        reconstruction: "residual" (default) or "replace".
        outputs: numbers of the blocks whose outputs are read. The outputs of these and of the last
            block have full resolution; with none, `()`, even the last stays on the clusters, see
            `clustering_of`. None for all outputs that the model may read.

    Returns:
        The model.

    Raises:
        ValueError: no encoder of a known family, several, or settings that do not fit it.
    """
    expect_module(model)
    keywords = {
        "iterations": iterations,
        "neighbourhood": neighbourhood,
        "topk": topk,
        "temperature": temperature,
    }
    settings = _settings(reduction, alpha, clusters, keywords, reconstruction)
    if settings.correction is not None:
        settings.correction.check(find_encoder(model)[1])
    prepare(model, settings, outputs)
    return model


def prepare(model: nn.Module, reduction: Reduction, outputs: Collection[int] | None = None) -> None:
    """Expedites a model in place whose weights may still be loaded: a correction is checked then.

    Args:
        model: the encoder, or a model that holds it.
        reduction: the settings.
        outputs: see `expedite`.

    Raises:
        ValueError: see `expedite`; the model stays as it was.
    """
    family, encoder = find_encoder(model)
    if family is None:
        if outputs is not None:
            raise ValueError(
                f"outputs must be left out for {type(encoder).__name__}, which knows its own"
            )
        encoder.reduction = reduction
        return
    hourglass = fit(family, encoder, reduction, outputs)
    restore(encoder)
    hourglass.install(reduction)


def restore(model: Model) -> Model:
    """Undoes `expedite`, in place; a model that is not expedited stays as it is.

    What has wrapped a changed method since, such as another library's hook, stays and calls the
    original from now on.

    Returns:
        The model.
    """
    expect_module(model)
    for module in model.modules():
        if isinstance(module, Expeditable):
            module.reduction = None
        elif ATTRIBUTE in vars(module):
            vars(module)[ATTRIBUTE].remove()
    return model


def remember(model: nn.Module) -> Callable[[], None]:
    """Returns a function that gives a model's encoder the settings back that it has now, or none.

    Args:
        model: the encoder, or a model that holds it.

    Raises:
        ValueError: no encoder of a known family, or several.
    """
    expect_module(model)
    family, encoder = find_encoder(model)
    before: Hourglass | None = vars(encoder).get(ATTRIBUTE)
    former: Reduction | None = getattr(encoder, "reduction", None)

    def undo() -> None:
        if family is None:
            encoder.reduction = former
            return
        restore(encoder)
        if before is not None and former is not None:
            before.install(former)

    return undo


def is_expedited(model: nn.Module) -> bool:
    """Whether a model is, or holds, an encoder that runs on fewer tokens."""
    return bool(expedited_encoders(model))


def expedited_encoders(model: nn.Module) -> dict[str, Any]:
    """Returns the encoders in a model that run on fewer tokens, by name; each has a `reduction`."""
    expect_module(model)
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        if any(not outer or name.startswith(f"{outer}.") for outer in found):
            continue
        own = isinstance(module, Expeditable) and module.reduction is not None
        if own or ATTRIBUTE in vars(module):
            found[name] = module
    return found


def expect_module(model: Any) -> None:
    """Raises a ValueError for what is no module."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def _settings(
    reduction: Reduction | None,
    alpha: int | None,
    clusters: Any,
    keywords: dict[str, Any],
    reconstruction: Reconstruction | None,
) -> Reduction:
    """Makes one value of the settings that `expedite` was given."""
    given = {name: value for name, value in keywords.items() if value is not None}
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
        beside = {"alpha": alpha, "clusters": clusters, "reconstruction": reconstruction, **given}
        twice = [name for name, value in beside.items() if value is not None]
        if twice:
            raise ValueError(
                f"settings must be a reduction or keywords, got a reduction and {', '.join(twice)}"
            )
        return reduction
    missing = [n for n, v in (("alpha", alpha), ("clusters", clusters)) if v is None]
    if missing:
        raise ValueError(f"expedite needs a reduction, or {' and '.join(missing)}")
    assert alpha is not None
    return Reduction((Cluster(alpha, clusters, **given),), reconstruction or "residual")
