"""ADE20K (the 150 classes of the scene parsing challenge): semantic, panoptic and instance."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from expedite_d2.d2.data.categories import ADE20K
from expedite_d2.d2.data.coco_format import register_instances, register_panoptic
from expedite_d2.d2.data.dataset_files import datasets_root
from expedite_d2.d2.data.semantic import register_semantic

_FOLDERS = {"train": "training", "val": "validation"}


def register_ade20k(root: Path | None = None) -> None:
    """Registers ``ade20k_{sem_seg,panoptic,instance}_{train,val}``.

    Args:
        root: Folder that holds ``ADEChallengeData2016/``; default: ``datasets_root()``.
    """
    ade = (root or datasets_root()) / "ADEChallengeData2016"
    for split, folder in _FOLDERS.items():
        images = ade / "images" / folder
        labels = ade / "annotations_detectron2" / folder
        register_semantic(
            f"ade20k_sem_seg_{split}",
            partial(_pairs, images, labels),
            images,
            labels,
            [category.name for category in ADE20K],
        )
        instances_json = ade / f"ade20k_instance_{split}.json"
        register_instances(f"ade20k_instance_{split}", instances_json, images, ADE20K)
        register_panoptic(
            f"ade20k_panoptic_{split}",
            ade / f"ade20k_panoptic_{split}.json",
            ade / f"ade20k_panoptic_{split}",
            images,
            instances_json,
            ADE20K,
            "ade20k_panoptic_seg",
            labels,
        )


def _pairs(images: Path, labels: Path, name: str) -> Iterator[tuple[Path, Path]]:
    for image in sorted(images.glob("*.jpg")):
        yield image, labels / f"{image.stem}.png"
