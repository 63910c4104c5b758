"""Reads data sets in COCO's formats into Detectron2's dataset dicts, and registers them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from expedite_d2.d2.data.categories import Category, class_colours
from expedite_d2.d2.data.coco_fields import Entry, box
from expedite_d2.d2.data.coco_json import InstanceFile, read_instances_json, read_panoptic_json
from expedite_d2.d2.data.dataset_files import require
from expedite_d2.d2.data.masks import mask_box
from expedite_d2.d2.provider import DatasetCatalog, MetadataCatalog

#: Detectron2's BoxMode.XYWH_ABS.
XYWH_ABS = 1
#: Label of pixels that do not count.
IGNORE_LABEL = 255


def register(name: str, load: Callable[[], list[Entry]], **metadata: Any) -> None:
    """Registers a data set and its metadata unless the name is taken (by Detectron2 itself)."""
    if name in DatasetCatalog.list():
        return
    DatasetCatalog.register(name, load)
    MetadataCatalog.get(name).set(**metadata)


def register_instances(
    name: str, json_file: Path, image_root: Path, categories: Sequence[Category]
) -> None:
    """Registers a data set with COCO instance annotations; its classes are the things."""
    metadata = instance_metadata(categories)
    ids = metadata["thing_dataset_id_to_contiguous_id"]
    register(
        name,
        partial(load_instances, name, json_file, image_root, ids),
        json_file=str(json_file),
        image_root=str(image_root),
        evaluator_type="coco",
        **metadata,
    )


def register_panoptic(
    name: str,
    panoptic_json: Path,
    panoptic_root: Path,
    image_root: Path,
    instances_json: Path | None,
    categories: Sequence[Category],
    evaluator_type: str,
    sem_seg_root: Path | None = None,
) -> None:
    """Registers a data set with COCO panoptic annotations.

    Args:
        name: Name of the data set.
        panoptic_json: Annotation file.
        panoptic_root: Folder of the segment PNGs.
        image_root: Folder of the images.
        instances_json: COCO instance annotations of the same images, which AP is measured with;
            None where there are none, and so no AP.
        categories: All classes, in the order of their contiguous ids.
        evaluator_type: Detectron2's name for the evaluation; it ends in ``_panoptic_seg``.
        sem_seg_root: Folder of the label PNGs, if there are any.
    """
    metadata = panoptic_metadata(categories)
    load = partial(
        load_panoptic,
        name,
        panoptic_json,
        panoptic_root,
        image_root,
        metadata,
        sem_seg_root=sem_seg_root,
    )
    metadata |= {
        "panoptic_root": str(panoptic_root),
        "panoptic_json": str(panoptic_json),
        "image_root": str(image_root),
        "evaluator_type": evaluator_type,
    }
    if instances_json is not None:
        metadata["json_file"] = str(instances_json)
    if sem_seg_root is not None:
        metadata["sem_seg_root"] = str(sem_seg_root)
    register(name, load, **metadata)


def panoptic_metadata(categories: Sequence[Category]) -> dict[str, Any]:
    """Classes, colours and ids of a panoptic data set, in Mask2Former's convention.

    A class's contiguous id is its place in `categories`; ``stuff_classes``, ``stuff_colors`` and
    ``stuff_dataset_id_to_contiguous_id`` hold all classes, so that they describe sem_seg, too.
    """
    colours = class_colours(len(categories))
    things = [number for number, category in enumerate(categories) if category.isthing]
    return {
        "thing_classes": [categories[number].name for number in things],
        "thing_colors": [colours[number] for number in things],
        "stuff_classes": [category.name for category in categories],
        "stuff_colors": colours,
        "thing_dataset_id_to_contiguous_id": {categories[n].id: n for n in things},
        "stuff_dataset_id_to_contiguous_id": {c.id: n for n, c in enumerate(categories)},
        "ignore_label": IGNORE_LABEL,
        "label_divisor": 1000,
    }


def instance_metadata(categories: Sequence[Category]) -> dict[str, Any]:
    """Classes, colours and ids of an instance data set: the things, numbered without gaps."""
    things = [category for category in categories if category.isthing]
    return {
        "thing_classes": [category.name for category in things],
        "thing_colors": class_colours(len(things)),
        "thing_dataset_id_to_contiguous_id": {c.id: n for n, c in enumerate(things)},
    }


def load_panoptic(
    name: str,
    panoptic_json: Path,
    panoptic_root: Path,
    image_root: Path,
    metadata: Mapping[str, Any],
    sem_seg_root: Path | None = None,
    instances_json: Path | None = None,
    depth_root: Path | None = None,
) -> list[Entry]:
    """Loads COCO panoptic annotations.

    Args:
        name: Name of the data set, for messages.
        panoptic_json: Annotation file.
        panoptic_root: Folder of the segment PNGs.
        image_root: Folder of the images.
        metadata: The two ``*_dataset_id_to_contiguous_id`` maps.
        sem_seg_root: Folder of the label PNGs (contiguous classes), if there are any.
        instances_json: COCO instance annotations of the same images, if they shall be added.
        depth_root: Folder of the 16-bit depth PNGs, if there are any.

    Returns:
        One dataset dict an image.

    Raises:
        FileNotFoundError: if a file or a folder is missing.
        ValueError: if the annotation file cannot be read or names an unknown category.
    """
    things = metadata["thing_dataset_id_to_contiguous_id"]
    stuff = metadata["stuff_dataset_id_to_contiguous_id"]
    contiguous = {**stuff, **things}
    file = read_panoptic_json(name, panoptic_json, is_thing(things, stuff))
    for folder in (panoptic_root, image_root, sem_seg_root, depth_root):
        if folder is not None:
            require(folder, name)
    instances: dict[str, list[Entry]] = {}
    if instances_json is not None:
        objects = read_instances_json(name, instances_json, things)
        instances = _instances_by_image(objects, things)
    entries = []
    for key, annotation in file.annotations.items():
        image = file.images.get(key, {})
        label = Path(annotation["file_name"])
        segments = []
        for segment in annotation["segments_info"]:
            category = segment["category_id"]
            known = {"category_id": contiguous[category], "isthing": category in things}
            segments.append({**segment, **known})
        entry: Entry = {
            "file_name": str(image_root / image.get("file_name", label.with_suffix(".jpg"))),
            "image_id": annotation["image_id"],
            "pan_seg_file_name": str(panoptic_root / label),
            "segments_info": segments,
        }
        entry |= {side: image[side] for side in ("height", "width") if side in image}
        if sem_seg_root is not None:
            entry["sem_seg_file_name"] = str(sem_seg_root / label)
        if depth_root is not None:
            entry["depth_file_name"] = str(depth_root / label)
        if instances_json is not None:
            entry["annotations"] = instances.get(key, [])
        entries.append(entry)
    return entries


def is_thing(things: Iterable[int], stuff: Iterable[int]) -> dict[int, bool]:
    """Category in the files of a panoptic data set -> is a thing; `stuff` may repeat the things."""
    return dict.fromkeys(stuff, False) | dict.fromkeys(things, True)


def load_instances(
    name: str, json_file: Path, image_root: Path, contiguous_ids: Mapping[int, int]
) -> list[Entry]:
    """Loads COCO instance annotations, also of images that have none.

    What is no mask is left out with a warning: one slip among thousands of annotations must not
    prevent a training.

    Args:
        name: Name of the data set, for messages.
        json_file: Annotation file.
        image_root: Folder of the images.
        contiguous_ids: Category id in the file -> contiguous id.

    Returns:
        One dataset dict an image, in the order of the image ids.

    Raises:
        FileNotFoundError: if a file or a folder is missing.
        ValueError: if the annotation file cannot be read or names an unknown category.
    """
    needed = ("file_name", "height", "width")
    file = read_instances_json(name, json_file, contiguous_ids, needed)
    require(image_root, name)
    instances = _instances_by_image(file, contiguous_ids)
    return [
        {
            "file_name": str(image_root / image["file_name"]),
            "height": image["height"],
            "width": image["width"],
            "image_id": image["id"],
            "annotations": instances.get(key, []),
        }
        for key, image in file.images.items()
    ]


def _instances_by_image(
    file: InstanceFile, contiguous_ids: Mapping[int, int]
) -> dict[str, list[Entry]]:
    grouped: dict[str, list[Entry]] = defaultdict(list)
    for annotation in file.annotations:
        key = str(annotation["image_id"])
        image, mask = file.images[key], annotation["segmentation"]
        grouped[key].append(
            {
                "bbox": box(annotation["bbox"]) or mask_box(mask, image["height"], image["width"]),
                "bbox_mode": XYWH_ABS,
                "category_id": contiguous_ids[annotation["category_id"]],
                "iscrowd": annotation["iscrowd"],
                "segmentation": mask,
            }
        )
    return grouped
