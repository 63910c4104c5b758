"""ADE20K (the 150 classes of the scene parsing challenge): semantic, panoptic and instance."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from expedite_d2.data.categories import ADE20K, class_colours
from expedite_d2.data.coco_format import (
    IGNORE_LABEL,
    Entry,
    datasets_root,
    instance_metadata,
    load_instances,
    load_panoptic,
    panoptic_metadata,
    register,
    require,
)

_FOLDERS = {"train": "training", "val": "validation"}


def register_ade20k(root: Path | None = None) -> None:
    """Registers ``ade20k_{sem_seg,panoptic,instance}_{train,val}``.

    Args:
        root: Folder that holds ``ADEChallengeData2016/``; default: ``datasets_root()``.
    """
    ade = (root or datasets_root()) / "ADEChallengeData2016"
    for split in _FOLDERS:
        _register_split(ade, split)


def load_semantic(name: str, image_root: Path, label_root: Path) -> list[Entry]:
    """Pairs images (``*.jpg``) with label PNGs of the same stem.

    Raises:
        FileNotFoundError: if a folder, or the labels of an image, are missing.
    """
    require(image_root, name)
    require(label_root, name)
    return [
        {
            "file_name": str(image),
            "sem_seg_file_name": str(require(label_root / f"{image.stem}.png", name)),
            "image_id": image.stem,
        }
        for image in sorted(image_root.glob("*.jpg"))
    ]


def _register_split(ade: Path, split: str) -> None:
    images = ade / "images" / _FOLDERS[split]
    labels = ade / "annotations_detectron2" / _FOLDERS[split]
    name = f"ade20k_sem_seg_{split}"
    register(
        name,
        partial(load_semantic, name, images, labels),
        stuff_classes=[category.name for category in ADE20K],
        stuff_colors=class_colours(len(ADE20K)),
        image_root=str(images),
        sem_seg_root=str(labels),
        evaluator_type="sem_seg",
        ignore_label=IGNORE_LABEL,
    )
    instances_json = ade / f"ade20k_instance_{split}.json"
    metadata = instance_metadata(ADE20K)
    ids = metadata["thing_dataset_id_to_contiguous_id"]
    name = f"ade20k_instance_{split}"
    register(
        name,
        partial(load_instances, name, instances_json, images, ids),
        json_file=str(instances_json),
        image_root=str(images),
        evaluator_type="coco",
        **metadata,
    )
    panoptic_json = ade / f"ade20k_panoptic_{split}.json"
    panoptic_root = ade / f"ade20k_panoptic_{split}"
    metadata = panoptic_metadata(ADE20K)
    name = f"ade20k_panoptic_{split}"
    register(
        name,
        partial(
            load_panoptic,
            name,
            panoptic_json,
            panoptic_root,
            images,
            metadata,
            sem_seg_root=labels,
        ),
        panoptic_root=str(panoptic_root),
        panoptic_json=str(panoptic_json),
        image_root=str(images),
        sem_seg_root=str(labels),
        json_file=str(instances_json),
        evaluator_type="ade20k_panoptic_seg",
        **metadata,
    )
