"""Logging to stdout and to a file, for both providers."""

from __future__ import annotations

import logging
import os
import sys
from typing import Any, TextIO

from termcolor import colored

_DATE = "%m/%d %H:%M:%S"
_LEVEL_COLOURS = {logging.WARNING: "yellow", logging.ERROR: "red", logging.CRITICAL: "red"}


class _StdoutHandler(logging.StreamHandler):
    """Writes to what ``sys.stdout`` is at that moment: progress bars and tests replace it."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stdout


class _ColourFormatter(logging.Formatter):
    def __init__(self, name: str, abbreviation: str) -> None:
        prefix = colored("[%(asctime)s %(name)s]: ", "green")
        super().__init__(prefix + "%(message)s", datefmt=_DATE)
        self._name, self._abbreviation = name, abbreviation

    def formatMessage(self, record: logging.LogRecord) -> str:
        shown: dict[str, Any] = dict(record.__dict__)
        if record.name == self._name or record.name.startswith(self._name + "."):
            rest = record.name[len(self._name) :]
            shown["name"] = (self._abbreviation + rest).lstrip(".")
        line = super().formatMessage(logging.makeLogRecord(shown))
        colour = _LEVEL_COLOURS.get(record.levelno)
        return line if colour is None else f"{colored(record.levelname, colour)} {line}"


def setup_logger(
    output: str | None = None,
    distributed_rank: int = 0,
    *,
    color: bool = True,
    name: str = "expedite_d2",
    abbrev_name: str | None = None,
    enable_propagation: bool = False,
    configure_stdout: bool = True,
) -> logging.Logger:
    """Send the messages of one logger to stdout (rank 0 alone) and to a file (every rank).

    Calling it again adds only what is not there yet, so a script may log to stdout first and to a
    file once it knows where.

    Args:
        output: a file that ends with ``.txt`` or ``.log``, or a directory, where ``log.txt`` is
            written; None writes no file.
        distributed_rank: rank of this process; above 0, ``.rank<N>`` is added to the file's name.
        color: coloured prefixes on stdout, where it is a terminal.
        name: the logger, and the root of those beneath it.
        abbrev_name: what is shown instead of ``name``.
        enable_propagation: whether messages also reach the parents' handlers.
        configure_stdout: whether to write to stdout at all.

    Returns:
        The logger.
    """
    logger = logging.getLogger(name)
    logger.setLevel(logging.DEBUG)
    logger.propagate = enable_propagation
    plain = logging.Formatter("[%(asctime)s] %(name)s %(levelname)s: %(message)s", datefmt=_DATE)

    if configure_stdout and distributed_rank == 0:
        if not any(isinstance(handler, _StdoutHandler) for handler in logger.handlers):
            stdout = _StdoutHandler()
            stdout.setFormatter(
                _ColourFormatter(name, name if abbrev_name is None else abbrev_name)
                if color
                else plain
            )
            logger.addHandler(stdout)

    if output is not None:
        is_file = output.endswith((".txt", ".log"))
        path = os.path.abspath(output if is_file else os.path.join(output, "log.txt"))
        if distributed_rank > 0:
            path += f".rank{distributed_rank}"
        open_files = [h.baseFilename for h in logger.handlers if isinstance(h, logging.FileHandler)]
        if path not in open_files:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            file = logging.FileHandler(path)
            file.setFormatter(plain)
            logger.addHandler(file)
    return logger
