"""Files that appear whole or not at all, and names that the file system takes."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

#: Longest name of a file, in bytes, on nearly all file systems.
MAX_NAME = 255
# What tempfile puts at the end of a name, in characters.
_RANDOM = 8


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path that becomes `path` when all went well.

    Nobody ever sees a half-written file, and what was there before stays until then. The temporary
    file has the same name, in a hidden directory beside `path`: libraries read the format from the
    suffix, and a checkpointer takes every `*.pth` in its directory for a checkpoint. The
    directory's name is not longer than `path`'s, unless that has less than ten bytes: wherever the
    one can be written, so can the other.

    Args:
        path: the file to write; its directory exists.

    Raises:
        FileNotFoundError, IsADirectoryError: it does not, or `path` is one.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"a file must be written to a folder that exists, got {path}")
    if path.is_dir():
        raise IsADirectoryError(f"a file must not have the name of a folder, got {path}")
    with tempfile.TemporaryDirectory(prefix=_prefix(path.name), dir=path.parent) as directory:
        partial = Path(directory) / path.name
        yield partial
        os.replace(partial, path)


def written(
    path: str | os.PathLike, write: Callable[[Path], Any], report: Callable[[str], Any]
) -> bool:
    """Write a file that others do not need, such as one picture of many.

    Args:
        path: the file; its directory exists.
        write: writes it to the temporary path of ``replacing``.
        report: takes a sentence where that is not possible: the name is too long for the file
            system, the disk is full, the folder is read-only.

    Returns:
        Whether it was written.
    """
    try:
        with replacing(path) as partial:
            write(partial)
    except OSError as error:
        report(f"{path} cannot be written: {error.strerror or error}")
        return False
    return True


def remove_leftovers(folder: str | os.PathLike, pattern: str) -> None:
    """Remove what processes that were killed while they wrote a file have left beside it.

    Args:
        folder: where the files are.
        pattern: glob pattern of the files' names.
    """
    for partial in Path(folder).glob(f".*-{'?' * _RANDOM}/{pattern}"):
        # A hidden directory of somebody else's may look alike, and hold such files.
        if partial.parent.name[:-_RANDOM] == _prefix(partial.name):
            shutil.rmtree(partial.parent, ignore_errors=True)


def fitting_name(stem: str, suffix: str) -> str:
    """`stem` and `suffix`, the stem shortened where they are longer than file names may be.

    Args:
        stem: any text; of a long one, its beginning and a digest of the whole are left, so that
            the same stem always has the same name and another one another.
        suffix: kept as it is.
    """
    limit = MAX_NAME - len(os.fsencode(suffix))
    if len(os.fsencode(stem)) > limit:
        digest = hashlib.sha256(os.fsencode(stem)).hexdigest()[:16]
        stem = f"{_beginning(stem, limit - len(digest) - 1)}-{digest}"
    return stem + suffix


def _prefix(name: str) -> str:
    """How the hidden directory of a file's temporary is called, but for its random end."""
    return f".{_beginning(name, len(os.fsencode(name)) - _RANDOM - 2)}-"


def _beginning(text: str, size: int) -> str:
    """As many whole characters of a text as there is room for in `size` bytes."""
    while text and len(os.fsencode(text)) > size:
        text = text[:-1]
    return text
