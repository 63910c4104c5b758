"""Pascal Context (PASCAL VOC 2010, 59 classes and the background): semantic segmentation.

The layout is MMSegmentation's, with the label PNGs that its conversion script writes.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from expedite_d2.d2.data.categories import PASCAL_CONTEXT
from expedite_d2.d2.data.dataset_files import datasets_root, read_lines, require
from expedite_d2.d2.data.semantic import register_semantic


def register_pascal_context(root: Path | None = None) -> None:
    """Registers ``pascal_context_{train,val}``.

    Args:
        root: Folder that holds ``VOCdevkit/VOC2010/``; default: ``datasets_root()``.
    """
    voc = (root or datasets_root()) / "VOCdevkit/VOC2010"
    for split in ("train", "val"):
        register_semantic(
            f"pascal_context_{split}",
            partial(_pairs, voc, split),
            voc / "JPEGImages",
            voc / "SegmentationClassContext",
            [category.name for category in PASCAL_CONTEXT],
        )


def _pairs(voc: Path, split: str, name: str) -> Iterator[tuple[Path, Path]]:
    """The images that the split's list names, one per line."""
    lines = read_lines(voc / f"ImageSets/SegmentationContext/{split}.txt", name)
    for stem in filter(None, map(str.strip, lines)):
        yield (
            require(voc / f"JPEGImages/{stem}.jpg", name),
            voc / f"SegmentationClassContext/{stem}.png",
        )
