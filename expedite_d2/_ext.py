"""Loads the compiled extension, the only module that imports ``expedite_d2._C``.

Importing the binary registers its CPU and CUDA kernels with the dispatcher. Where it is missing or
does not load, the operators run their PyTorch references, and the reason is kept (see `ext_error`).
"""

from __future__ import annotations

import os
import platform
from types import ModuleType
from typing import Any

import torch  # before the binary, which links against libraries that importing torch loads

_NO_EXT = "EXPEDITE_D2_NO_EXT"

_module: ModuleType | None = None
_error: str | None = None

if os.environ.get(_NO_EXT, "0") not in ("", "0"):
    _error = f"the extension is switched off by {_NO_EXT}={os.environ[_NO_EXT]}"
elif platform.machine() in ("x86_64", "AMD64") and not torch.cpu._is_avx2_supported():
    # setup.py compiles for AVX2; elsewhere the first kernel would end the process.
    _error = "the extension needs a CPU with AVX2"
else:
    try:
        from expedite_d2 import _C as _module  # type: ignore[attr-defined,no-redef]
    except ImportError as error:
        # Also what the loader raises for a binary of another torch version (undefined symbol).
        _error = f"the extension could not be loaded: {error}"


def has_ext() -> bool:
    """Tells whether the compiled kernels are loaded."""
    return _module is not None


def ext_error() -> str | None:
    """Returns why the compiled kernels are not loaded, or None where they are."""
    return _error


def build_info() -> dict[str, Any]:
    """Returns how the extension was built.

    Returns:
        ``cuda`` (version or None), ``archs`` (list of str), ``compiler`` and ``torch`` (str).
        Without the extension, ``torch`` is the running version and the others are None or empty.
    """
    if _module is None:
        return {"cuda": None, "archs": [], "compiler": None, "torch": torch.__version__}
    return dict(_module.build_info())
