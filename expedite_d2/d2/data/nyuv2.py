"""NYU Depth v2: depth of indoor scenes, as monocular depth estimation uses it.

Layout below ``DETECTRON2_DATASETS``, that of BTS::

    nyu_depth_v2/
      nyudepthv2_train_files_with_gt.txt  nyudepthv2_test_files_with_gt.txt
      sync/kitchen_0028b/{rgb_00045.jpg,sync_depth_00045.png}                       (training)
      official_splits/test/bathroom/{rgb_00045.jpg,sync_depth_00045.png}            (654 images)

In each line of a list stand an image, its depth map and the focal length.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from expedite_d2.d2.data.coco_fields import Entry
from expedite_d2.d2.data.coco_format import register
from expedite_d2.d2.data.dataset_files import datasets_root, require
from expedite_d2.d2.data.kitti import read_file_list

_METADATA: dict[str, Any] = {
    "evaluator_type": "depth",
    "depth_scale": 1 / 1000,
    "depth_min": 1e-3,
    "depth_max": 10.0,
    "depth_crop": "nyu",
}
_FOLDERS = {"train": "sync", "test": "official_splits/test"}


def register_nyuv2(root: Path | None = None) -> None:
    """Registers ``nyuv2_train`` and ``nyuv2_test``.

    Args:
        root: Folder that holds ``nyu_depth_v2/``; default: ``datasets_root()``.
    """
    nyu = (root or datasets_root()) / "nyu_depth_v2"
    for split, folder in _FOLDERS.items():
        name = f"nyuv2_{split}"
        file_list = nyu / f"nyudepthv2_{split}_files_with_gt.txt"
        load = partial(load_nyuv2, name, file_list, nyu / folder)
        register(name, load, file_list=str(file_list), image_root=str(nyu / folder), **_METADATA)


def load_nyuv2(name: str, file_list: Path, root: Path) -> list[Entry]:
    """Loads the images of a list.

    Args:
        name: Name of the data set, for messages.
        file_list: Lines of image, depth map and focal length.
        root: Folder of images and depth maps.

    Raises:
        FileNotFoundError: the list, the folder or a depth map is missing.
        ValueError: a line of the list that is none.
    """
    lines = read_file_list(name, file_list)
    require(root, name)
    return [
        {
            "file_name": str(root / image),
            "image_id": image,
            "depth_file_name": str(require(root / depth, name)),
            "depth_scale": _METADATA["depth_scale"],
        }
        for image, depth in lines
    ]
