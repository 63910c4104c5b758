"""Reads COCO's annotation files, for loaders and evaluators alike.

A field that is missing or null has the meaning that COCO gives it. A number may be written as text
("7"), a flag as true or false; whatever else is not what the format says is an error that names the
entry by its place in the file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from expedite_d2.d2.data.coco_fields import (
    Entry,
    Fault,
    category,
    each,
    file_name,
    flag,
    identifier,
    whole,
)
from expedite_d2.d2.data.dataset_files import read_json, tell_once
from expedite_d2.d2.data.masks import MOST_PIXELS, OtherSize, check_segmentation

# The three bytes of a pixel hold a segment's id; 0 is void.
_LARGEST_SEGMENT_ID = 2**24 - 1


class PanopticFile(NamedTuple):
    """A panoptic annotation file. Its keys are ids as text: files write 7 here and "7" there.

    Attributes:
        images: Key -> id, and file_name, height, width as far as they are known.
        annotations: Key of the image -> image_id, file_name, segments_info; each segment has an id
            of its own, category_id (the data set's) and iscrowd.
        isthing: Category -> is a thing.
    """

    images: dict[str, Entry]
    annotations: dict[str, Entry]
    isthing: dict[int, bool]


class InstanceFile(NamedTuple):
    """An instance annotation file.

    Attributes:
        images: Id as text -> id, height, width, and file_name if it is known; sorted by id.
        annotations: image_id, category_id (the data set's), iscrowd, a segmentation that
            pycocotools can take, and bbox and area as they stand in the file, or None.
    """

    images: dict[str, Entry]
    annotations: list[Entry]


def read_panoptic_json(name: str, path: Path, isthing: Mapping[int, bool]) -> PanopticFile:
    """Reads panoptic annotations.

    Args:
        name: Name of the data set, for messages.
        path: The file.
        isthing: The data set's categories -> is a thing; what the file says goes first.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not a COCO file, or one that names an unknown category.
    """
    annotations: dict[str, Entry] = {}
    listed: dict[int, bool] = {}
    twice: list[str] = []

    def take_class(record: Entry) -> None:
        number = whole(record, "id")
        thing = bool(flag(record, "isthing", isthing.get(number, False)))
        if listed.setdefault(number, thing) != thing:
            raise Fault(f"category {number} is listed as a thing and as stuff")

    def take_annotation(record: Entry) -> None:
        image_id = identifier(record, "image_id")
        key = str(image_id)
        annotation = {
            "image_id": images[key]["id"] if key in images else image_id,
            "file_name": file_name(record),
            "segments_info": _segments(record, isthing, twice),
        }
        if annotations.setdefault(key, annotation) != annotation:
            raise Fault(f"image {key} is annotated twice, and not alike")

    with _naming(name, path):
        content = _content(name, path)
        images = _images(content, ()) if content.get("images") is not None else {}
        if content.get("categories") is not None:
            each(content, "categories", take_class)
        each(content, "annotations", take_annotation)
    if twice:
        tell_once(
            f"data set {name!r}: {path} lists {len(twice)} segments twice, which count once; the "
            f"first is {twice[0]}"
        )
    if not listed:
        return PanopticFile(images, annotations, dict(isthing))
    used = {s["category_id"] for a in annotations.values() for s in a["segments_info"]}
    return PanopticFile(images, annotations, {c: isthing[c] for c in used} | listed)


def read_instances_json(
    name: str,
    path: Path,
    categories: Mapping[int, Any],
    needed: Sequence[str] = ("height", "width"),
    strict: bool = False,
) -> InstanceFile:
    """Reads instance annotations; those of images that the file does not list are left out.

    Args:
        name: Name of the data set, for messages.
        path: The file.
        categories: The data set's category ids are its keys.
        needed: What an image must have.
        strict: Whether a segmentation that is no mask is an error, or left out with a warning.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not a COCO file, or one that names an unknown category.
    """
    annotations: list[Entry] = []
    left_out: list[str] = []

    def take(record: Entry) -> None:
        image_id = identifier(record, "image_id")
        image = images.get(str(image_id))
        if image is None:
            left_out.append(f"image {image_id} is not listed")
            return
        if "segmentation" not in record:
            raise Fault("lacks 'segmentation'")
        annotation = {
            "image_id": image["id"],
            "category_id": category(record, categories),
            "iscrowd": flag(record, "iscrowd", 0),
            "bbox": record.get("bbox"),
            "area": record.get("area"),
        }
        size = image["height"], image["width"]
        try:
            annotation["segmentation"] = check_segmentation(record["segmentation"], *size)
        except ValueError as error:
            if strict or isinstance(error, OtherSize):
                raise Fault(str(error)) from error
            left_out.append(f"image {image_id}: {error}")
            return
        annotations.append(annotation)

    with _naming(name, path):
        content = _content(name, path)
        images = _images(content, needed)
        each(content, "annotations", take)
    if left_out:
        tell_once(
            f"data set {name!r}: {len(left_out)} of the {len(content['annotations'])} annotations "
            f"of {path} are left out; the first, {left_out[0]}"
        )
    return InstanceFile(images, annotations)


def _content(name: str, path: Path) -> dict[str, Any]:
    content = read_json(path, name)
    if not isinstance(content, dict) or content.get("annotations") is None:
        raise Fault("it has no 'annotations'")
    return content


@contextmanager
def _naming(name: str, path: Path) -> Iterator[None]:
    """Adds the data set and the file to what is wrong with an entry."""
    try:
        yield
    except Fault as fault:
        raise ValueError(f"data set {name!r}: {path} is not a COCO file: {fault}") from fault


def _images(content: Entry, needed: Sequence[str]) -> dict[str, Entry]:
    images: dict[str, Entry] = {}

    def take(record: Entry) -> None:
        image: Entry = {"id": identifier(record, "id")}
        if record.get("file_name") is not None:
            image["file_name"] = file_name(record)
        for side in ("height", "width"):
            if record.get(side) is not None:
                image[side] = whole(record, side, least=1)
        for field in needed:
            if field not in image:
                raise Fault(f"lacks {field!r}")
        height, width = image.get("height", 1), image.get("width", 1)
        if height * width > MOST_PIXELS:
            raise Fault(f"{height}x{width} are more than the {MOST_PIXELS} pixels of any image")
        if images.setdefault(str(image["id"]), image) != image:
            raise Fault(f"image {image['id']} is listed twice, and not alike")

    each(content, "images", take)
    # Numbers before names, where a file has both.
    order = sorted(images.items(), key=lambda item: (isinstance(item[1]["id"], str), item[1]["id"]))
    return dict(order)


def _segments(annotation: Entry, categories: Mapping[int, Any], twice: list[str]) -> list[Entry]:
    """The segments of an image; tells in `twice` which are listed twice, and so counted once."""
    segments: dict[int, Entry] = {}

    def take(record: Entry) -> None:
        number = whole(record, "id", least=1, most=_LARGEST_SEGMENT_ID)
        known = {
            "id": number,
            "category_id": category(record, categories),
            "iscrowd": flag(record, "iscrowd", 0),
        }
        if number not in segments:
            segments[number] = {**record, **known}
        elif all(segments[number][field] == value for field, value in known.items()):
            twice.append(f"segment {number} of image {annotation['image_id']}")
        else:
            raise Fault(f"segment {number} is listed twice, and not with one category")

    each(annotation, "segments_info", take)
    return list(segments.values())
