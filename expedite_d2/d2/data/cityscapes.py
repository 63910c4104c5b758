"""Cityscapes (fine annotations): panoptic, semantic and instance, in Detectron2's layout."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from expedite_d2.d2.data.categories import CITYSCAPES
from expedite_d2.d2.data.coco_fields import Entry
from expedite_d2.d2.data.coco_format import (
    XYWH_ABS,
    instance_metadata,
    load_panoptic,
    panoptic_metadata,
    register,
)
from expedite_d2.d2.data.dataset_files import datasets_root, require
from expedite_d2.d2.data.images import image_size, read_label_map
from expedite_d2.d2.data.semantic import register_semantic

_IMAGE_SUFFIX = "_leftImg8bit.png"
_LABEL_SUFFIX = "_gtFine_labelTrainIds.png"
_INSTANCE_SUFFIX = "_gtFine_instanceIds.png"
#: In instance PNGs, objects are class · 1000 + number, groups of objects the class alone.
_INSTANCE_DIVISOR = 1000


def register_cityscapes(root: Path | None = None) -> None:
    """Registers ``cityscapes_fine_{panoptic,sem_seg,instance_seg}_{train,val}``.

    ``*_labelTrainIds.png`` and ``cityscapes_panoptic_*`` are what cityscapesScripts'
    ``createTrainIdLabelImgs`` and ``createPanopticImgs`` write.

    Args:
        root: Folder that holds ``cityscapes/``; default: ``datasets_root()``.
    """
    cityscapes = (root or datasets_root()) / "cityscapes"
    for split in ("train", "val"):
        images = cityscapes / "leftImg8bit" / split
        labels = cityscapes / "gtFine" / split
        register_semantic(
            f"cityscapes_fine_sem_seg_{split}",
            partial(_semantic_pairs, images, labels),
            images,
            labels,
            [category.name for category in CITYSCAPES],
            "cityscapes_sem_seg",
        )
        name = f"cityscapes_fine_instance_seg_{split}"
        metadata = instance_metadata(CITYSCAPES)
        ids = metadata["thing_dataset_id_to_contiguous_id"]
        register(
            name,
            partial(load_cityscapes_instances, name, images, labels, ids),
            image_dir=str(images),
            gt_dir=str(labels),
            evaluator_type="cityscapes_instance",
            **metadata,
        )
        panoptic_root = cityscapes / f"gtFine/cityscapes_panoptic_{split}"
        panoptic_json = panoptic_root.with_suffix(".json")
        name = f"cityscapes_fine_panoptic_{split}"
        metadata = panoptic_metadata(CITYSCAPES)
        register(
            name,
            partial(
                load_cityscapes_panoptic,
                name,
                panoptic_json,
                panoptic_root,
                images,
                labels,
                metadata,
            ),
            panoptic_root=str(panoptic_root),
            panoptic_json=str(panoptic_json),
            image_root=str(images),
            gt_dir=str(labels),
            evaluator_type="cityscapes_panoptic_seg",
            **metadata,
        )


def load_cityscapes_panoptic(
    name: str,
    panoptic_json: Path,
    panoptic_root: Path,
    image_root: Path,
    label_root: Path,
    metadata: Mapping[str, Any],
) -> list[Entry]:
    """Loads the annotations of createPanopticImgs; see ``load_panoptic``.

    The images lie in one folder a city, which their names begin with, and are not called what the
    annotation file calls them.
    """
    require(label_root, name)
    entries = load_panoptic(name, panoptic_json, panoptic_root, image_root, metadata)
    for entry in entries:
        stem = str(entry["image_id"])
        city = stem.split("_")[0]
        entry["file_name"] = str(image_root / city / f"{stem}{_IMAGE_SUFFIX}")
        entry["sem_seg_file_name"] = str(label_root / city / f"{stem}{_LABEL_SUFFIX}")
    return entries


def load_cityscapes_instances(
    name: str, image_root: Path, label_root: Path, contiguous_ids: Mapping[int, int]
) -> list[Entry]:
    """Loads the objects of the classes that count, as exact masks.

    Args:
        name: Name of the data set, for messages.
        image_root: Folder of the cities' folders of images.
        label_root: Folder of the cities' folders of ``*_instanceIds.png``.
        contiguous_ids: Cityscapes' class id -> contiguous id.

    Raises:
        FileNotFoundError: if a folder or an annotation is missing.
        ValueError: an annotation that is no map of labels of its image's size.
    """
    pairs = list(_pairs(image_root, label_root, _INSTANCE_SUFFIX, name))
    # 3 000 files of 2 megapixels: decoding releases the interpreter's lock.
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda pair: _instance_entry(pair[0], pair[1], contiguous_ids), pairs))


def _instance_entry(image: Path, labels: Path, contiguous_ids: Mapping[int, int]) -> Entry:
    ids = read_label_map(labels, image_size(image)).astype(np.int32)
    annotations = []
    for number, mask in instance_masks(ids).items():
        crowd = number < _INSTANCE_DIVISOR
        category = number if crowd else number // _INSTANCE_DIVISOR
        if category in contiguous_ids:
            annotations.append(
                {
                    "bbox": coco_mask.toBbox(mask).tolist(),
                    "bbox_mode": XYWH_ABS,
                    "category_id": contiguous_ids[category],
                    "iscrowd": int(crowd),
                    "segmentation": mask,
                }
            )
    return {
        "file_name": str(image),
        "image_id": image.stem.removesuffix("_leftImg8bit"),
        "height": ids.shape[0],
        "width": ids.shape[1],
        "annotations": annotations,
    }


def instance_masks(ids: NDArray[np.int32]) -> dict[int, dict[str, Any]]:
    """Run-length encoded mask of every id of a map, from one pass over it.

    Args:
        ids: (H, W).
    """
    height, width = ids.shape
    columns = ids.ravel(order="F")  # the order of COCO's runs
    starts = np.flatnonzero(np.diff(columns, prepend=columns[:1] - 1))
    stops = np.append(starts[1:], columns.size)
    owners = columns[starts]
    masks = {}
    for number in np.unique(owners).tolist():
        runs = np.stack([starts[owners == number], stops[owners == number]], axis=1).ravel()
        counts = np.diff(runs, prepend=0, append=columns.size)  # outside and inside in turn
        rle = {"size": [height, width], "counts": counts.tolist()}
        masks[number] = coco_mask.frPyObjects(rle, height, width)
    return masks


def _semantic_pairs(images: Path, labels: Path, name: str) -> Iterator[tuple[Path, Path]]:
    return _pairs(images, labels, _LABEL_SUFFIX, name)


def _pairs(images: Path, labels: Path, suffix: str, name: str) -> Iterator[tuple[Path, Path]]:
    """Each image with its annotation of the given suffix, city by city."""
    require(images, name)
    require(labels, name)
    for image in sorted(images.glob(f"*/*{_IMAGE_SUFFIX}")):
        stem = image.name.removesuffix(_IMAGE_SUFFIX)
        yield image, require(labels / image.parent.name / f"{stem}{suffix}", name)
