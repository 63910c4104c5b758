"""COCO 2017: instances and panoptic, in the usual layout below DETECTRON2_DATASETS."""

from __future__ import annotations

from pathlib import Path

from expedite_d2.d2.data.categories import COCO_PANOPTIC
from expedite_d2.d2.data.coco_format import register_instances, register_panoptic
from expedite_d2.d2.data.dataset_files import datasets_root


def register_coco(root: Path | None = None) -> None:
    """Registers ``coco_2017_{train,val}``, and the same with ``_panoptic``.

    ``coco_2017_{train,val}_panoptic_with_sem_seg`` are those with Mask2Former's label PNGs.

    Args:
        root: Folder that holds ``coco/``; default: ``datasets_root()``.
    """
    coco = (root or datasets_root()) / "coco"
    for split in ("train", "val"):
        images = coco / f"{split}2017"
        instances_json = coco / f"annotations/instances_{split}2017.json"
        register_instances(f"coco_2017_{split}", instances_json, images, COCO_PANOPTIC)
        for suffix, sem_seg_root in (
            ("", None),
            ("_with_sem_seg", coco / f"panoptic_semseg_{split}2017"),
        ):
            register_panoptic(
                f"coco_2017_{split}_panoptic{suffix}",
                coco / f"annotations/panoptic_{split}2017.json",
                coco / f"panoptic_{split}2017",
                images,
                instances_json,
                COCO_PANOPTIC,
                "coco_panoptic_seg",
                sem_seg_root,
            )
