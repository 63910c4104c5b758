"""A folder in the layout of the labelled frames of NYU Depth v2, registered for a while."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from expedite_d2.d2 import DatasetCatalog, MetadataCatalog
from expedite_d2.d2.data.nyuv2_labeled import SPLITS, TUNE_FRAMES, register_nyuv2_labeled

SIZE = (480, 640)
_NAMES = [
    f"nyuv2_labeled_{kind}_{split}"
    for kind in ("depth", "sem_seg", "sem_seg_40")
    for split in SPLITS
]


@contextmanager
def few_rooms(root: Path, test: Sequence[str]) -> Iterator[Path]:
    """Two frames to train with, those of "tune", and some to test with; gives the folder."""
    path = root / "nyuv2_labeled"
    train = [f"{number:04d}" for number in range(1, TUNE_FRAMES + 3)]
    for kind in ("images", "depth", "labels40"):
        (path / kind).mkdir(parents=True)
    (path / "train.txt").write_text("\n".join(train) + "\n")
    (path / "test.txt").write_text("\n".join(test) + "\n")
    columns = np.indices(SIZE)[1]
    for frame in (*train, *test):
        Image.new("RGB", SIZE[::-1], (9, 9, 9)).save(path / "images" / f"{frame}.jpg")
        Image.fromarray((columns % 256).astype(np.uint8)).save(path / "depth" / f"{frame}.png")
        Image.fromarray((columns % 40).astype(np.uint8)).save(path / "labels40" / f"{frame}.png")
    _forget()
    register_nyuv2_labeled(root)
    try:
        yield path
    finally:
        _forget()
        register_nyuv2_labeled()


def _forget() -> None:
    for name in _NAMES:
        if name in DatasetCatalog.list():
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
