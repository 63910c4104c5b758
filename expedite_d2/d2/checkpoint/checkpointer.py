"""Checkpoints of a training run that are never half written, and that are read with care."""

from __future__ import annotations

import glob
import logging
import os
import pickle
import re
import zipfile
from typing import Any
from urllib.parse import urlparse

import torch

from expedite_d2.d2 import provider
from expedite_d2.files import remove_leftovers, replacing

logger = logging.getLogger(__name__)


class CorruptCheckpointError(ValueError):
    """A checkpoint file that cannot be read: truncated, or no checkpoint at all."""


def why_unreadable(path: str | os.PathLike, error: Exception) -> str:
    """Why a file is no checkpoint; its reader's own error may be about something else altogether.

    Args:
        path: the file.
        error: what its reader raised.
    """
    with open(path, "rb") as file:
        start = file.read(20)
    if not start:
        return "it is empty"
    # The directory of a zip archive, which torch.save writes, stands at its end.
    if isinstance(error, EOFError) or (start[:2] == b"PK" and not _ends_as_zip(path)):
        return "it is truncated"
    if isinstance(error, pickle.UnpicklingError) and start[:1] != b"\x80" and start[:2] != b"PK":
        return f"neither torch.save nor pickle wrote it, it begins with {start!r}"
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _ends_as_zip(path: str | os.PathLike) -> bool:
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:  # bytes behind the end may look like that of a larger kind
        return False


class DetectionCheckpointer(provider.DetectionCheckpointer):
    """The provider's checkpointer, which never leaves a half-written file and survives one.

    A checkpoint is written under a temporary name and renamed once it is complete. On resume, one
    that cannot be read or is not there is passed over, with a warning, for the one before.
    """

    def save(self, name: str, **kwargs: Any) -> None:
        """Write the model, the checkpointables and ``kwargs`` to ``save_dir/name.pth``."""
        if not self.save_dir or not self.save_to_disk:
            return
        states = {key: value.state_dict() for key, value in self.checkpointables.items()}
        path = os.path.join(self.save_dir, f"{name}.pth")
        logger.info("saving checkpoint %s", path)
        os.makedirs(self.save_dir, exist_ok=True)
        # A run that is killed while it writes a checkpoint leaves the part behind.
        remove_leftovers(self.save_dir, f"{glob.escape(name.rpartition('_')[0])}_*.pth")
        with replacing(path) as partial:
            torch.save({"model": self.model.state_dict(), **states, **kwargs}, partial)
        self.tag_last_checkpoint(f"{name}.pth")

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Note which checkpoint is the newest."""
        with replacing(os.path.join(self.save_dir, "last_checkpoint")) as partial:
            partial.write_text(last_filename_basename)

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load a checkpoint; what was saved beside model and checkpointables is returned.

        Raises:
            FileNotFoundError: there is no such file.
            CorruptCheckpointError: the file cannot be read.
        """
        if path and not urlparse(path).scheme and not os.path.isfile(path.partition("?")[0]):
            raise FileNotFoundError(f"checkpoint {path} does not exist")
        try:
            return super().load(path, *args, **kwargs)
        finally:
            # Detectron2's keeps the address of a failed load and refuses the next one.
            self._parsed_url_during_load = None

    def _load_file(self, filename: str) -> dict[str, Any]:
        try:
            return super()._load_file(filename)
        except PermissionError:
            raise
        except Exception as error:  # unpickling arbitrary bytes can fail in every way
            reason = why_unreadable(filename, error)
            raise CorruptCheckpointError(
                f"checkpoint {filename} cannot be read: {reason}"
            ) from error

    def has_checkpoint(self) -> bool:
        """Whether there is anything to resume from, be it readable or not."""
        return bool(self._checkpoints())

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """Go on from the newest readable checkpoint of ``save_dir``, else load ``path``.

        Args:
            path: weights to begin with, where there is nothing to resume.
            resume: whether to look for a checkpoint; without, only the model is loaded.

        Raises:
            CorruptCheckpointError: there are checkpoints to resume from, and none can be read.
        """
        if not (resume and self.has_checkpoint()):
            return self.load(path, checkpointables=[])
        failures = []
        for candidate in self._checkpoints():
            try:
                extra = self.load(candidate)
            except (CorruptCheckpointError, FileNotFoundError) as error:
                failures.append(str(error))
                logger.warning("%s; trying the one before", error)
                continue
            if failures:
                logger.warning("resuming from %s instead", candidate)
            return extra
        raise CorruptCheckpointError(
            f"no checkpoint in {self.save_dir} can be read to resume from: {'; '.join(failures)}"
        )

    def _checkpoints(self) -> list[str]:
        """The tagged checkpoint, then the periodic ones of this run from the newest to the oldest.

        A run that was killed between its first checkpoint and the tag left no tag.
        """
        tagged = self.get_checkpoint_file()
        prefix = os.path.basename(tagged).rpartition("_")[0] or "model"
        numbered = re.compile(rf"{re.escape(prefix)}_\d{{7,}}\.pth")
        found = self.get_all_checkpoint_files() if os.path.isdir(self.save_dir) else []
        others = [
            file for file in found if file != tagged and numbered.fullmatch(os.path.basename(file))
        ]
        return [tagged] * bool(tagged) + sorted(others, key=os.path.getmtime, reverse=True)
