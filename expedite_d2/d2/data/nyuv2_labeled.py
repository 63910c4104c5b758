"""The 1449 labelled frames of NYU Depth v2: depth in 8 bits, and 40 or 13 semantic classes.

Layout below ``DETECTRON2_DATASETS``::

    nyuv2_labeled/
      images/ID.jpg  depth/ID.png  labels40/ID.png       ID: 0001 to 1449
      train.txt (795)  test.txt (654)                    the official split, one ID a line

`benchmarks/rooms_data.py` makes it of what is public. All is mirrored left to right. A depth PNG of
value v means (v + 0.5) * 9.99547 / 255 metres; labels are 0 for what does not count, or a class of
NYU-40 from 1 to 39 ("otherprop", 40, counts as 0). The 13 classes are unions of these.

The last 80 frames of the training split, which are of other rooms, are the split ``tune``: settings
are chosen on them, and nothing is trained on them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from expedite_d2.d2.data.categories import class_colours
from expedite_d2.d2.data.coco_fields import Entry
from expedite_d2.d2.data.coco_format import IGNORE_LABEL, register
from expedite_d2.d2.data.dataset_files import datasets_root, read_lines, require

SPLITS = ("train", "tune", "test")
#: Frames of the training split that are kept out of training.
TUNE_FRAMES = 80

_DEPTH: dict[str, Any] = {
    "evaluator_type": "depth",
    "depth_scale": 9.99547 / 255,
    "depth_offset": 0.5,
    "depth_min": 1e-3,
    "depth_max": 10.0,
    "depth_crop": "nyu_mirrored",
}
# Names of NYU-40, and the number of the class among the 13.
_CLASSES_40 = """
    wall 12; floor 5; cabinet 6; bed 1; chair 4; sofa 9; table 10; door 12; window 13; bookshelf 6;
    picture 8; counter 6; blinds 13; desk 10; shelves 6; curtain 13; dresser 6; pillow 7; mirror 7;
    floor mat 5; clothes 7; ceiling 3; books 2; refrigerator 6; television 11; paper 7; towel 7;
    shower curtain 7; box 7; whiteboard 7; person 7; night stand 6; toilet 7; sink 7; lamp 7;
    bathtub 7; bag 7; otherstructure 7; otherfurniture 6; otherprop 7
"""
_PAIRS = [entry.split()[-1:] + [" ".join(entry.split()[:-1])] for entry in _CLASSES_40.split(";")]
_NAMES_40 = [name for _, name in _PAIRS]
_NAMES_13 = ["bed", "books", "ceiling", "chair", "floor", "furniture", "objects", "picture"]
_NAMES_13 += ["sofa", "table", "tv", "wall", "window"]
# By number of classes: their names, and the class of each label in the files.
_SEMANTIC: dict[int, tuple[list[str], list[int]]] = {
    13: (_NAMES_13, [IGNORE_LABEL, *(int(number) - 1 for number, _ in _PAIRS)]),
    40: (_NAMES_40, [IGNORE_LABEL, *range(len(_NAMES_40))]),
}


def register_nyuv2_labeled(root: Path | None = None) -> None:
    """Registers ``nyuv2_labeled_depth_SPLIT``, and ``nyuv2_labeled_sem_seg_SPLIT`` (13 classes).

    Also ``nyuv2_labeled_sem_seg_40_SPLIT``. SPLIT is train, tune or test.

    Args:
        root: Folder that holds ``nyuv2_labeled/``; default: ``datasets_root()``.
    """
    folder = (root or datasets_root()) / "nyuv2_labeled"
    for split in SPLITS:
        name = f"nyuv2_labeled_depth_{split}"
        depth = {field: _DEPTH[field] for field in ("depth_scale", "depth_offset")}
        of_frame = _files(folder, "depth_file_name", "depth", depth)
        load = partial(load_frames, name, folder, split, of_frame)
        register(name, load, image_root=str(folder / "images"), **_DEPTH)
        for classes, (names, lookup) in _SEMANTIC.items():
            name = f"nyuv2_labeled_sem_seg_{'40_' if classes == 40 else ''}{split}"
            labels = {"sem_seg_classes": lookup}
            of_frame = _files(folder, "sem_seg_file_name", "labels40", labels)
            register(
                name,
                partial(load_frames, name, folder, split, of_frame),
                stuff_classes=names,
                stuff_colors=class_colours(len(names)),
                image_root=str(folder / "images"),
                sem_seg_root=str(folder / "labels40"),
                evaluator_type="sem_seg",
                ignore_label=IGNORE_LABEL,
            )


def load_frames(
    name: str, folder: Path, split: str, of_frame: Callable[[str, str], Entry]
) -> list[Entry]:
    """Loads the frames of a split.

    Args:
        name: Name of the data set, for messages.
        folder: The data set's folder.
        split: One of `SPLITS`.
        of_frame: The fields of a frame's annotation, from the data set's name and the frame's ID.

    Raises:
        FileNotFoundError: a list, a folder or an annotation is missing.
        ValueError: a list that holds too few frames.
    """
    path = folder / ("test.txt" if split == "test" else "train.txt")
    frames = [line.strip() for line in read_lines(path, name) if line.strip()]
    if split != "test":
        if len(frames) <= TUNE_FRAMES:
            raise ValueError(
                f"data set {name!r}: {path} must list more than {TUNE_FRAMES} frames, got "
                f"{len(frames)}"
            )
        frames = frames[-TUNE_FRAMES:] if split == "tune" else frames[:-TUNE_FRAMES]
    images = require(folder / "images", name)
    return [
        {"file_name": str(images / f"{frame}.jpg"), "image_id": frame, **of_frame(name, frame)}
        for frame in frames
    ]


def _files(
    folder: Path, field: str, kind: str, further: Mapping[str, Any]
) -> Callable[[str, str], Entry]:
    return partial(_file, folder / kind, field, further)


def _file(folder: Path, field: str, further: Mapping[str, Any], name: str, frame: str) -> Entry:
    return {field: str(require(folder / f"{frame}.png", name)), **further}
