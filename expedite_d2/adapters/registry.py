"""Registry of the families of encoders, and the search for an encoder in a model."""

from __future__ import annotations

from typing import Any

from torch import nn

from expedite_d2.adapters.family import Family
from expedite_d2.adapters.refusals import why_not
from expedite_d2.reducers import Expeditable

_FAMILIES: dict[str, Family] = {}


def families() -> tuple[Family, ...]:
    """Returns all registered families, in the order in which an encoder is compared with them."""
    return tuple(_FAMILIES.values())


def register_family(family: Family) -> Family:
    """Registers a family for `expedite`, and replaces one of the same name.

    A new family precedes those before it, so that a more specific one is found first.

    Args:
        family: the description of the family.

    Returns:
        The family.

    Raises:
        ValueError: not a Family.
    """
    if not isinstance(family, Family):
        raise ValueError(f"register_family takes a Family, got {family!r}")
    global _FAMILIES
    known = {name: other for name, other in _FAMILIES.items() if name != family.name}
    _FAMILIES = {family.name: family, **known}  # at once: other threads may be looking
    return family


def family_named(name: str) -> Family:
    """Returns the family of a name, for models that were copied or pickled.

    Raises:
        ValueError: no family of this name is registered.
    """
    if name not in _FAMILIES:
        raise ValueError(
            f"the family {name!r} is not registered: call register_family before the model is "
            "copied or read"
        )
    return _FAMILIES[name]


def find_encoder(model: nn.Module) -> tuple[Family | None, Any]:
    """Finds the one encoder that a model is or holds, and its family, None for this project's own.

    Raises:
        ValueError: none, or several.
    """
    found: dict[str, tuple[Family | None, Any]] = {}
    for name, module in model.named_modules():
        if any(not outer or name.startswith(f"{outer}.") for outer in found):
            continue
        if isinstance(module, Expeditable):
            found[name] = None, module
            continue
        for family in families():
            if family.recognises(module):
                found[name] = family, module
                break
    if not found:
        raise ValueError(why_not(model, families()))
    if len(found) > 1:
        raise ValueError(
            f"{type(model).__name__} holds {len(found)} encoders, of which encoder= of expedite "
            f"names one: {', '.join(found)}"
        )
    return next(iter(found.values()))
