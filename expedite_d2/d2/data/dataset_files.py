"""Finds and reads the files of data sets; every error names the data set and the file."""

from __future__ import annotations

import functools
import json
import logging
import os
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


def datasets_root() -> Path:
    """Folder of all downloaded data sets: DETECTRON2_DATASETS, or ./datasets."""
    return Path(os.environ.get("DETECTRON2_DATASETS") or "datasets").expanduser()


def require(path: Path, name: str) -> Path:
    """Returns `path` if it exists.

    Raises:
        FileNotFoundError: naming the data set, the path and the environment variable.
    """
    if not path.exists():
        raise FileNotFoundError(
            f"data set {name!r}: {path} not found; set DETECTRON2_DATASETS to the folder that "
            f"holds the data sets (now {os.environ.get('DETECTRON2_DATASETS', 'not set')!r}, "
            f"so {datasets_root().resolve()} was searched)"
        )
    return path


def read_lines(path: Path, name: str) -> list[str]:
    """Lines of a list of files that belongs to a data set.

    Raises:
        FileNotFoundError: naming the data set, the path and the environment variable.
        ValueError: not a text file.
    """
    try:
        # Windows' editors begin a file with a byte-order mark.
        return require(path, name).read_text(encoding="utf-8-sig").splitlines()
    except (UnicodeDecodeError, IsADirectoryError) as error:
        raise ValueError(f"data set {name!r}: {path} is not a text file: {error}") from error


def read_json(path: Path, name: str) -> Any:
    """Content of a JSON file in any of Unicode's encodings, with a byte-order mark or without.

    Raises:
        FileNotFoundError: naming the data set, the path and the environment variable.
        ValueError: not a JSON file.
    """
    try:
        return json.loads(require(path, name).read_bytes())
    except (ValueError, RecursionError, IsADirectoryError) as error:
        raise ValueError(f"data set {name!r}: {path} is not a JSON file: {error}") from error


@functools.cache
def tell_once(message: str) -> None:
    """Warns, however often the files that the message is about are read again."""
    logger.warning("%s", message)
