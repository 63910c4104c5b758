"""timm, imported by the first model that needs it."""

from __future__ import annotations

import warnings
from types import ModuleType


def import_timm() -> ModuleType:
    """The module `timm`, without what its import warns of.

    Whoever uses no ViT need not wait for it, nor read that torch deprecates what timm still uses.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        import timm
    return timm
