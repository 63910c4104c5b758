"""Import of timm by the first model that needs it."""

from __future__ import annotations

import warnings
from types import ModuleType


def import_timm() -> ModuleType:
    """Returns the module `timm`.

    Defers a slow import, and silences timm's deprecation warnings.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        import timm
    return timm
