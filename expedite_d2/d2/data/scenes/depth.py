"""Registers ``scenes_depth_train``, ``_val`` and ``_tune``: the scenes as a task of depth."""

from __future__ import annotations

from functools import partial
from typing import Any

from expedite_d2.d2.data.coco_fields import Entry
from expedite_d2.d2.data.coco_format import register
from expedite_d2.d2.data.scenes.writer import SPLITS
from expedite_d2.d2.provider import DatasetCatalog

_METADATA: dict[str, Any] = {
    "evaluator_type": "depth",
    "depth_scale": 1 / 256,
    "depth_min": 1e-3,
    # As in KITTI; the farthest ground of a scene is at 100 m.
    "depth_max": 80.0,
    "depth_crop": "",
}


def register_scenes_depth() -> None:
    """Registers every split under ``scenes_depth_<split>``; nothing is made yet."""
    for split in SPLITS:
        register(f"scenes_depth_{split}", partial(load_scenes_depth, split), **_METADATA)


def load_scenes_depth(split: str) -> list[Entry]:
    """Dataset dicts of a split, made if it is not there yet, with their depth maps alone."""
    fields = ("file_name", "height", "width", "image_id", "depth_file_name")
    return [
        {field: entry[field] for field in fields} | {"depth_scale": _METADATA["depth_scale"]}
        for entry in DatasetCatalog.get(f"scenes_{split}")
    ]
