"""Folders of images with panoptic annotations in COCO's format, registered wherever they lie.

Each folder of ``DETECTRON2_DATASETS`` with a file ``panoptic_SPLIT.json`` is one::

    NAME/
      panoptic_SPLIT.json    COCO's panoptic format, of any split
      panoptic/SPLIT/        segment PNGs
      images/SPLIT/          the images
      categories.json        the list "categories" of that format, if they are not COCO's 133

It is registered as ``NAME_SPLIT_panoptic``, when this package is imported. The annotation file is
read with the data set.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from expedite_d2.d2.data.categories import COCO_PANOPTIC, Category
from expedite_d2.d2.data.coco_format import register_panoptic
from expedite_d2.d2.data.dataset_files import datasets_root, read_json, tell_once

_PREFIX = "panoptic_"


def register_panoptic_folders(root: Path | None = None) -> None:
    """Registers every such folder.

    Args:
        root: Folder that holds them; default: ``datasets_root()``.
    """
    for path in sorted((root or datasets_root()).glob(f"*/{_PREFIX}*.json")):
        split = path.stem.removeprefix(_PREFIX)
        images, segments = (path.parent / kind / split for kind in ("images", "panoptic"))
        if not images.is_dir() or not segments.is_dir():  # COCO's own layout, for example
            continue
        name = f"{path.parent.name}_{split}_panoptic"
        try:
            categories = _categories(name, path.parent / "categories.json")
        except ValueError as error:  # other data sets are not concerned
            tell_once(f"{error}; it is not registered")
            continue
        register_panoptic(name, path, segments, images, None, categories, "coco_panoptic_seg")


def _categories(name: str, path: Path) -> Sequence[Category]:
    if not path.is_file():
        return COCO_PANOPTIC
    try:
        listed = read_json(path, name)
        return [Category(int(c["id"]), str(c["name"]), bool(c["isthing"])) for c in listed]
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(
            f"data set {name!r}: {path} must be a list of categories, each with id, name and "
            f"isthing: {error!r}"
        ) from error
