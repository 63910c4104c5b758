"""KITTI, Eigen split: depth from one image, with the improved ground truth of the benchmark.

Layout below ``DETECTRON2_DATASETS``::

    kitti/
      eigen_train_files_with_gt.txt  eigen_test_files_with_gt.txt
      raw/2011_09_26/2011_09_26_drive_0002_sync/image_02/data/0000000069.png
      data_depth_annotated/{train,val}/2011_09_26_drive_0002_sync/proj_depth/groundtruth/image_02/…

The lists are the field's usual ones (they come with BTS): in each line an image, its depth map or
``None``, and the focal length. Images without a depth map do not count: 652 of the 697 test images
have one.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from expedite_d2.d2.data.coco_fields import Entry
from expedite_d2.d2.data.coco_format import register
from expedite_d2.d2.data.dataset_files import datasets_root, read_lines, require

#: What the benchmark, and DPT's release, cut out of each image: rows and columns.
BENCHMARK_CROP = (352, 1216)

_METADATA: dict[str, Any] = {
    "evaluator_type": "depth",
    "depth_scale": 1 / 256,
    "depth_min": 1e-3,
    "depth_max": 80.0,
    "depth_crop": "garg",
}
# The official archives have a folder of the benchmark's own split above the drives.
_DEPTH_FOLDERS = ("train", "val", ".")


def register_kitti(root: Path | None = None) -> None:
    """Registers ``kitti_eigen_train`` and ``kitti_eigen_test``.

    Args:
        root: Folder that holds ``kitti/``; default: ``datasets_root()``.
    """
    kitti = (root or datasets_root()) / "kitti"
    for split in ("train", "test"):
        name = f"kitti_eigen_{split}"
        file_list = kitti / f"eigen_{split}_files_with_gt.txt"
        load = partial(load_kitti, name, file_list, kitti / "raw", kitti / "data_depth_annotated")
        register(name, load, file_list=str(file_list), image_root=str(kitti / "raw"), **_METADATA)


def load_kitti(name: str, file_list: Path, image_root: Path, depth_root: Path) -> list[Entry]:
    """Loads the images of a list that have a depth map.

    Args:
        name: Name of the data set, for messages.
        file_list: Lines of image, depth map or "None", and focal length.
        image_root: Folder of the raw recordings.
        depth_root: Folder of the depth maps, with the benchmark's "train" and "val" or without.

    Raises:
        FileNotFoundError: the list, a folder or a depth map is missing.
        ValueError: a line of the list that is none.
    """
    lines = read_file_list(name, file_list)
    require(image_root, name)
    require(depth_root, name)
    return [
        {
            "file_name": str(image_root / image),
            "image_id": image,
            "depth_file_name": str(_find_depth(name, depth_root, depth)),
            "depth_scale": _METADATA["depth_scale"],
            "benchmark_crop": BENCHMARK_CROP,
        }
        for image, depth in lines
        if depth != "None"
    ]


def read_file_list(name: str, file_list: Path) -> list[tuple[str, str]]:
    """Pairs of image and depth map, relative to their folders, from a list in BTS's format.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line without two names, or not a text file.
    """
    pairs = []
    for number, line in enumerate(read_lines(file_list, name), 1):
        words = line.split()
        if not words:
            continue
        if len(words) < 2:
            raise ValueError(
                f"data set {name!r}: line {number} of {file_list} must name an image and a depth "
                f"map, got {line!r}"
            )
        # NYUv2's list of training images starts each name with a slash.
        pairs.append((words[0].lstrip("/"), words[1].lstrip("/")))
    return pairs


def _find_depth(name: str, root: Path, depth: str) -> Path:
    for folder in _DEPTH_FOLDERS:
        path = root / folder / depth
        if path.is_file():
            return path
    return require(root / _DEPTH_FOLDERS[0] / depth, name)
