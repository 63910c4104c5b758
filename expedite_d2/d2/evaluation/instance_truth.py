"""The ground truth of COCO's average precision, so that no number in a file misleads it."""

from __future__ import annotations

from collections.abc import Container, Hashable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from pycocotools import mask as coco_mask

from expedite_d2.d2.data.coco_fields import area, box, category, each, flag, whole
from expedite_d2.d2.data.coco_json import InstanceFile
from expedite_d2.d2.data.masks import check_segmentation, decompressed, encode_segmentation, outline
from expedite_d2.d2.evaluation.evaluator import image_key

# Some tools count a box's last pixel and some do not; COCO's masks are rounded besides.
_BOX_TOLERANCE = 2.0


class Truth(NamedTuple):
    """The annotation of some images in COCO's format, which pycocotools takes as it is.

    Attributes:
        dataset: images, annotations, categories. The ids of images and annotations count from 1,
            in their order: for pycocotools an annotation of id 0 is not there.
        numbers: Key of an image -> its id.
        contradictions: Annotations whose area or box is not that of their mask, which was taken.
    """

    dataset: dict[str, Any]
    numbers: dict[str, int]
    contradictions: list[str]


def coco_truth(file: InstanceFile, keys: Container[str], categories: Iterable[int]) -> Truth:
    """The annotation of the images with these keys.

    Area and box are the file's where its masks explain them: COCO's own are those of the polygons,
    which decide what is small, medium and large. Otherwise they are those of the mask.

    Args:
        file: The annotation of the whole data set.
        keys: The images, by their ids as text.
        categories: The data set's category ids.
    """
    images = {key: image for key, image in file.images.items() if key in keys}
    numbers = {key: number for number, key in enumerate(images, 1)}
    annotations: list[dict[str, Any]] = []
    contradictions: list[str] = []
    for annotation in file.annotations:
        key = str(annotation["image_id"])
        if key not in images:
            continue
        segmentation = annotation["segmentation"]
        mask = encode_segmentation(segmentation, images[key]["height"], images[key]["width"])
        measured = {"area": float(coco_mask.area(mask)), "bbox": coco_mask.toBbox(mask).tolist()}
        explained = {
            "area": explained_area(annotation["area"], segmentation, mask),
            "bbox": explained_box(annotation["bbox"], segmentation, mask),
        }
        for field, value in explained.items():
            if value is None and annotation[field] is not None:
                given = f"{field} {annotation[field]!r:.60}"
                contradictions.append(f"image {key}: {given}, the mask's is {measured[field]}")
        annotations.append(
            {
                "id": len(annotations) + 1,
                "image_id": numbers[key],
                "category_id": annotation["category_id"],
                "iscrowd": annotation["iscrowd"],
                "segmentation": mask,
                **{
                    field: measured[field] if value is None else value
                    for field, value in explained.items()
                },
            }
        )
    dataset = {
        "images": [{**image, "id": numbers[key]} for key, image in images.items()],
        "annotations": annotations,
        "categories": [{"id": number} for number in categories],
    }
    return Truth(dataset, numbers, contradictions)


def explained_area(value: Any, segmentation: Any, mask: dict[str, Any]) -> float | None:
    """An annotated area if the mask explains it, None if not.

    Args:
        value: What stands in the file.
        segmentation: Polygons or run lengths.
        mask: The same as compressed run lengths.

    Returns:
        `value` if it is no farther from the area of the mask, or of the polygons, than the outline
        is long: so much depends on whether the pixels on the outline count.
    """
    number = area(value)
    if number is None:
        return None
    areas = [float(coco_mask.area(mask))]
    if isinstance(segmentation, list):
        areas.append(sum(map(_polygon_area, segmentation)))
        length = sum(outline(polygon) + 1 for polygon in segmentation)
    else:
        # A run begins and ends on the outline; what is upright of it, at least the box tells.
        length = len(decompressed(mask["counts"])) + 2 * float(coco_mask.toBbox(mask)[3])
    return number if min(areas) - length <= number <= max(areas) + length else None


def explained_box(value: Any, segmentation: Any, mask: dict[str, Any]) -> list[float] | None:
    """An annotated box [x, y, width, height] if the mask, or its polygons, explain it, or None."""
    annotated = box(value)
    if annotated is None:
        return None
    boxes = [coco_mask.toBbox(mask)]
    if isinstance(segmentation, list):
        points = np.concatenate([np.reshape(polygon, (-1, 2)) for polygon in segmentation])
        corner = points.min(axis=0)
        polygon_box = np.concatenate([corner, points.max(axis=0) - corner])
        # A mask without pixels lies nowhere.
        boxes = [*boxes, polygon_box] if boxes[0].any() else [polygon_box]
    sides = _sides(np.array(boxes))
    low, high = sides.min(axis=0) - _BOX_TOLERANCE, sides.max(axis=0) + _BOX_TOLERANCE
    inside = (low <= _sides(np.array([annotated]))) & (_sides(np.array([annotated])) <= high)
    return annotated if inside.all() else None


def entries_as_file(
    name: str, entries: Iterable[Mapping[str, Any]], dataset_ids: Mapping[int, int]
) -> InstanceFile:
    """The annotation of a data set that has no annotation file, from its dataset dicts.

    Args:
        name: Name of the data set, for messages.
        entries: Dataset dicts with ``annotations``.
        dataset_ids: Contiguous id -> the data set's category id.

    Raises:
        ValueError: an entry without a size or annotations, or with what is no mask of its size.
    """
    images: dict[str, dict[str, Any]] = {}
    annotations: list[dict[str, Any]] = []
    for entry in entries:
        key = image_key(entry)
        try:
            size = whole(entry, "height", least=1), whole(entry, "width", least=1)
            annotations += _entry_annotations(entry, key, size, dataset_ids)
        except ValueError as error:
            raise ValueError(f"data set {name!r}: image {key}: {error}") from error
        images[str(key)] = {"id": key, "height": size[0], "width": size[1]}
    return InstanceFile(images, annotations)


def _entry_annotations(
    entry: Mapping[str, Any],
    key: Hashable,
    size: tuple[int, int],
    dataset_ids: Mapping[int, int],
) -> list[dict[str, Any]]:
    annotations: list[dict[str, Any]] = []

    def take(annotation: dict[str, Any]) -> None:
        annotations.append(
            {
                "image_id": key,
                "category_id": dataset_ids[category(annotation, dataset_ids)],
                "iscrowd": flag(annotation, "iscrowd", 0),
                "segmentation": check_segmentation(annotation.get("segmentation"), *size),
                "bbox": None,
                "area": None,
            }
        )

    each(entry, "annotations", take)
    return annotations


def _polygon_area(polygon: list[float]) -> float:
    x, y = np.reshape(polygon, (-1, 2)).T
    return abs(float(x @ np.roll(y, 1) - y @ np.roll(x, 1))) / 2


def _sides(boxes: np.ndarray) -> np.ndarray:
    """(N, 4) x, y, width, height -> left, top, right, bottom."""
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
