"""Addresses of files, resolved to files of this machine."""

from __future__ import annotations

from typing import IO, Any

from iopath.common.file_io import HTTPURLHandler, OneDrivePathHandler, PathHandler
from iopath.common.file_io import PathManager as _PathManager

#: Which further handlers may be registered with, as with Detectron2's own.
PathManager = _PathManager()


class Detectron2Handler(PathHandler):
    """``detectron2://NAME``: what Detectron2 publishes."""

    PREFIX = "detectron2://"
    ADDRESS = "https://dl.fbaipublicfiles.com/detectron2/"

    def _get_supported_prefixes(self) -> list[str]:
        return [self.PREFIX]

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        return PathManager.get_local_path(self._address(path), force, **kwargs)

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs: Any) -> IO[Any]:
        return PathManager.open(self._address(path), mode, buffering, **kwargs)

    def _address(self, path: str) -> str:
        return self.ADDRESS + path.removeprefix(self.PREFIX)


for _handler in (HTTPURLHandler(), OneDrivePathHandler(), Detectron2Handler()):
    PathManager.register_handler(_handler)
