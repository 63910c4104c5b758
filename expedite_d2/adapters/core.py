"""`expedite` with given settings, `restore` and `is_expedited`."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, TypeVar

from torch import nn

from expedite_d2.adapters.fit import fit
from expedite_d2.adapters.hourglass import ATTRIBUTE, Hourglass
from expedite_d2.adapters.registry import find_encoder
from expedite_d2.reducers import Expeditable, Reduction

Model = TypeVar("Model", bound=nn.Module)


def expedite(model: Model, reduction: Reduction, outputs: Collection[int] | None = None) -> Model:
    """Expedites a model in place: see `expedite_d2.expedite`, which takes settings in other forms.

    Args:
        model: the encoder, or a model that holds it.
        reduction: the settings.
        outputs: see `expedite_d2.expedite`.

    Returns:
        The model.

    Raises:
        ValueError: no encoder of a known family, several, or settings that do not fit it; the model
            stays as it was.
    """
    expect_module(model)
    if reduction.correction is not None:
        reduction.correction.check(find_encoder(model)[1])
    prepare(model, reduction, outputs)
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

    Raises:
        ValueError: not a module.
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
    """Whether a model is, or holds, an encoder that runs on fewer tokens.

    Raises:
        ValueError: not a module.
    """
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
