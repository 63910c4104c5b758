"""Registers ``scenes_train``, ``_val`` and ``_tune``, which are made when they are first loaded."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from expedite_d2.d2.data.categories import Category
from expedite_d2.d2.data.coco_fields import Entry
from expedite_d2.d2.data.coco_format import load_panoptic, panoptic_metadata, register
from expedite_d2.d2.data.scenes.writer import (
    CATEGORIES,
    SPLITS,
    cache_root,
    ensure_split,
    split_directory,
)


def register_scenes() -> None:
    """Registers every split under ``scenes_<split>``; nothing is made yet."""
    categories = [Category(c["id"], c["name"], bool(c["isthing"])) for c in CATEGORIES]
    # Read once: the metadata holds the paths, and the loader must not move away from them.
    root = cache_root()
    for split in SPLITS:
        directory = split_directory(split, root)
        metadata = panoptic_metadata(categories)
        register(
            f"scenes_{split}",
            partial(load_scenes, split, root, metadata),
            panoptic_root=str(directory / "panoptic"),
            panoptic_json=str(directory / "panoptic.json"),
            json_file=str(directory / "instances.json"),
            image_root=str(directory / "images"),
            sem_seg_root=str(directory / "semantic"),
            evaluator_type="coco_panoptic_seg",
            **metadata,
        )


def load_scenes(split: str, root: Path, metadata: dict[str, Any]) -> list[Entry]:
    """Dataset dicts of a split with everything that the scenes have.

    Args:
        split: "train", "val" or "tune"; it is made if it is not there yet.
        root: Cache directory.
        metadata: The two ``*_dataset_id_to_contiguous_id`` maps.
    """
    directory = ensure_split(split, root)
    return load_panoptic(
        f"scenes_{split}",
        directory / "panoptic.json",
        directory / "panoptic",
        directory / "images",
        metadata,
        sem_seg_root=directory / "semantic",
        instances_json=directory / "instances.json",
        depth_root=directory / "depth",
    )
