"""Where a checkpoint is: a path, or an address that the PathManager fetches."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.error import HTTPError, URLError

from expedite_d2.d2.config import find_weights
from expedite_d2.d2.provider import PathManager


def local_path(address: str | os.PathLike) -> Path:
    """The file or directory of this machine that an address stands for.

    Known are paths, ``expedite_d2://``, and whatever the PathManager has a handler for:
    ``detectron2://``, ``https://`` and what else was registered. What is fetched stays in iopath's
    cache (``$FVCORE_CACHE``, by default ``~/.torch/iopath_cache``), and lies there once it is
    complete.

    Raises:
        OSError: what the address names cannot be fetched, or no handler knows addresses like it.
    """
    given = find_weights(os.fspath(address))
    try:
        local = PathManager.get_local_path(given)
    except Exception as error:  # each handler fails in its own ways
        raise OSError(f"{given} cannot be fetched: {_reason(error)}") from error
    scheme, is_address, _ = given.partition("://")
    if is_address and local == given:  # taken for a path of this machine
        raise OSError(
            f"{given} cannot be fetched: no handler for {scheme}:// is registered with the "
            "PathManager"
        )
    return Path(local)


def _reason(error: Exception) -> str:
    """Why a handler failed, in one line; urllib wraps what the network said."""
    cause: object = error
    if isinstance(error, URLError) and not isinstance(error, HTTPError):
        cause = error.reason
    text = (isinstance(cause, OSError) and cause.strerror) or str(cause).strip()
    return (text or type(cause).__name__).splitlines()[0]
