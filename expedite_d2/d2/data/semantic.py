"""Data sets of images and label PNGs: semantic segmentation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

from expedite_d2.d2.data.categories import class_colours
from expedite_d2.d2.data.coco_fields import Entry
from expedite_d2.d2.data.coco_format import IGNORE_LABEL, register
from expedite_d2.d2.data.dataset_files import require

#: Lists the pairs (image, label PNG) of a data set, whose name it is given for messages.
Pairs = Callable[[str], Iterable[tuple[Path, Path]]]


def register_semantic(
    name: str,
    pairs: Pairs,
    image_root: Path,
    label_root: Path,
    classes: Sequence[str],
    evaluator_type: str = "sem_seg",
) -> None:
    """Registers a data set whose label PNGs hold contiguous classes, 255 where none counts.

    Args:
        name: Name of the data set.
        pairs: Lists its images and labels when it is loaded.
        image_root: Folder of the images.
        label_root: Folder of the labels.
        classes: Names, in the order of the labels.
        evaluator_type: Detectron2's name for the evaluation.
    """
    register(
        name,
        partial(load_semantic, name, pairs, image_root, label_root),
        stuff_classes=list(classes),
        stuff_colors=class_colours(len(classes)),
        image_root=str(image_root),
        sem_seg_root=str(label_root),
        evaluator_type=evaluator_type,
        ignore_label=IGNORE_LABEL,
    )


def load_semantic(name: str, pairs: Pairs, image_root: Path, label_root: Path) -> list[Entry]:
    """One dataset dict a pair; an image's id is its file name without the suffix.

    Raises:
        FileNotFoundError: if a folder, or the labels of an image, are missing.
    """
    require(image_root, name)
    require(label_root, name)
    return [
        {
            "file_name": str(image),
            "sem_seg_file_name": str(require(label, name)),
            "image_id": image.stem,
        }
        for image, label in pairs(name)
    ]
