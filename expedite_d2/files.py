"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path that becomes `path` when all went well.

    Nobody ever sees a half-written file, and what was there before stays until then. The temporary
    file has the same name, in a hidden directory beside `path`: libraries read the format from the
    suffix, and a checkpointer takes every `*.pth` in its directory for a checkpoint.

    Args:
        path: the file to write; its directory exists.
    """
    path = Path(path)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as directory:
        partial = Path(directory) / path.name
        yield partial
        os.replace(partial, path)
