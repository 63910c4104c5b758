"""COCO 2017: instances and panoptic, in the usual layout below DETECTRON2_DATASETS."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from expedite_d2.data.categories import COCO_PANOPTIC
from expedite_d2.data.coco_format import (
    datasets_root,
    instance_metadata,
    load_instances,
    load_panoptic,
    panoptic_metadata,
    register,
)


def register_coco(root: Path | None = None) -> None:
    """Registers ``coco_2017_{train,val}``, and the same with ``_panoptic``.

    ``coco_2017_{train,val}_panoptic_with_sem_seg`` are those with Mask2Former's label PNGs.

    Args:
        root: Folder that holds ``coco/``; default: ``datasets_root()``.
    """
    coco = (root or datasets_root()) / "coco"
    for split in ("train", "val"):
        _register_split(coco, split)


def _register_split(coco: Path, split: str) -> None:
    images = coco / f"{split}2017"
    instances_json = coco / f"annotations/instances_{split}2017.json"
    metadata = instance_metadata(COCO_PANOPTIC)
    ids = metadata["thing_dataset_id_to_contiguous_id"]
    name = f"coco_2017_{split}"
    register(
        name,
        partial(load_instances, name, instances_json, images, ids),
        json_file=str(instances_json),
        image_root=str(images),
        evaluator_type="coco",
        **metadata,
    )
    panoptic_json = coco / f"annotations/panoptic_{split}2017.json"
    panoptic_root = coco / f"panoptic_{split}2017"
    sem_seg_root = coco / f"panoptic_semseg_{split}2017"
    metadata = panoptic_metadata(COCO_PANOPTIC) | {
        "panoptic_root": str(panoptic_root),
        "panoptic_json": str(panoptic_json),
        "image_root": str(images),
        "json_file": str(instances_json),
        "evaluator_type": "coco_panoptic_seg",
    }
    name = f"coco_2017_{split}_panoptic"
    load = partial(load_panoptic, name, panoptic_json, panoptic_root, images, metadata)
    register(name, load, **metadata)
    name += "_with_sem_seg"
    load = partial(
        load_panoptic,
        name,
        panoptic_json,
        panoptic_root,
        images,
        metadata,
        sem_seg_root=sem_seg_root,
    )
    register(name, load, sem_seg_root=str(sem_seg_root), **metadata)
