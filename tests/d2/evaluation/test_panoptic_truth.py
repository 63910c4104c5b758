"""Panoptic quality where annotation file and PNGs contradict each other, or say too little."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from expedite_d2.d2.data.dataset_files import tell_once
from expedite_d2.d2.evaluation import PanopticEvaluator, SemanticEvaluator

SIZE = (12, 16)
THINGS, STUFF = {3: 0, 7: 1}, {9: 2}
Change = Callable[[dict[str, Any]], None]


def segment_map() -> np.ndarray:
    ids = np.full(SIZE, 70000)
    ids[1:5, 1:6], ids[6:11, 8:15], ids[0] = 300, 1, 0
    return ids


def save(path: Path, ids: np.ndarray) -> None:
    rgb = np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8)
    Image.fromarray(rgb).save(path)


def valid_file() -> dict[str, Any]:
    ids = segment_map()
    annotations = [
        {
            "image_id": image,
            "file_name": f"{image}.png",
            "segments_info": [
                {"id": s, "category_id": c, "iscrowd": 0, "area": int((ids == s).sum())}
                for s, c in ((300, 3), (1, 7), (70000, 9))
            ],
        }
        for image in (1, 2)
    ]
    return {
        "images": [{"id": i, "file_name": f"{i}.jpg"} for i in (1, 2)],
        "annotations": annotations,
        "categories": [{"id": c, "isthing": int(c in THINGS)} for c in (3, 7, 9)],
    }


@pytest.fixture
def pngs(tmp_path):
    for image in (1, 2):
        save(tmp_path / f"{image}.png", segment_map())


@pytest.fixture
def quality(pngs, tmp_path, new_dataset):
    """PQ, PQ_th, PQ_st of a fair prediction against the file that `change` made of a valid one."""

    def call(change: Change) -> dict[str, float | None]:
        content = valid_file()
        change(content)
        (tmp_path / "panoptic.json").write_text(json.dumps(content))
        name = new_dataset(
            [],
            panoptic_json=str(tmp_path / "panoptic.json"),
            panoptic_root=str(tmp_path),
            thing_dataset_id_to_contiguous_id=THINGS,
            stuff_dataset_id_to_contiguous_id=STUFF,
        )
        evaluator = PanopticEvaluator(name)
        evaluator.reset()
        ids = segment_map()
        found = np.select([ids == 300, ids == 1, ids == 70000], [1, 2, 3]).astype(np.int32)
        found[1:3, 1:6] = 3  # half of a thing is taken for the ground
        segments = [{"id": k + 1, "isthing": k < 2, "category_id": k} for k in range(3)]
        for image in (1, 2):
            output = {"panoptic_seg": (torch.from_numpy(found), segments)}
            evaluator.process([{"image_id": image}], [output])
        return evaluator.evaluate()["panoptic_seg"]

    return call


@pytest.fixture
def warnings(caplog):
    tell_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        yield caplog


def unchanged(content: dict[str, Any]) -> None:
    pass


def segments(**fields: Any) -> Change:
    """Gives a field of every segment a value, or what a function makes of the segment."""

    def change(content: dict[str, Any]) -> None:
        for annotation in content["annotations"]:
            for one in annotation["segments_info"]:
                for field, value in fields.items():
                    one[field] = value(one) if callable(value) else value

    return change


def segments_without(field: str) -> Change:
    return lambda c: [s.pop(field) for a in c["annotations"] for s in a["segments_info"]]


def ids_of_images(rename: Callable[[int], Any]) -> Change:
    return lambda c: [a.update(image_id=rename(a["image_id"])) for a in c["annotations"]]


SAME = {
    "no area": segments_without("area"),
    "area null": segments(area=None),
    "no iscrowd": segments_without("iscrowd"),
    "iscrowd of text": segments(iscrowd="0"),
    "iscrowd false": segments(iscrowd=False),
    "segments of text": segments(id=lambda one: str(one["id"])),
    "categories of text": segments(category_id=lambda one: str(one["category_id"])),
    "categories of floats": segments(category_id=lambda one: float(one["category_id"])),
    "no categories": lambda content: content.pop("categories"),
    "categories null": lambda content: content.update(categories=None),
    "no isthing": lambda content: [c.pop("isthing") for c in content["categories"]],
    "isthing of text": lambda c: [k.update(isthing=str(k["isthing"])) for k in c["categories"]],
    "categories that lack one": lambda content: content["categories"].pop(),
    "images of text": ids_of_images(str),
    "images of floats": ids_of_images(float),
    "no images": lambda content: content.pop("images"),
    "an image twice": lambda content: content["images"].append(content["images"][0]),
    "an annotation twice": lambda content: content["annotations"].append(content["annotations"][0]),
}


@pytest.mark.parametrize("change", SAME.values(), ids=SAME)
def test_what_can_only_mean_one_thing_changes_no_digit(change, quality, warnings):
    assert quality(change) == quality(unchanged)
    assert not warnings.records


@pytest.mark.parametrize(
    "area",
    [0, 1, -5, 1e11, 10**400, math.nan, math.inf, "many", [], True],
    ids=lambda value: str(value)[:10],
)
def test_areas_are_counted_and_told_once(area, quality, warnings):
    expected = quality(unchanged)
    assert quality(segments(area=area)) == expected
    (told,) = [record.getMessage() for record in warnings.records]
    assert "panoptic.json contradicts the pixels of 2 images, which count; the first" in told
    assert "image 1: segment 300 has 20 pixels, not " in told


def without_pixels(content: dict[str, Any]) -> None:
    for annotation in content["annotations"]:
        annotation["segments_info"].append({"id": 5, "category_id": 3, "area": 40, "iscrowd": 0})


def twice(content: dict[str, Any]) -> None:
    for annotation in content["annotations"]:
        annotation["segments_info"] *= 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_pixels, "contradicts the pixels of 2 images.*image 1: segment 5 has no pixels"),
        (twice, "lists 6 segments twice, which count once; the first is segment 300 of image 1"),
    ],
)
def test_segments_count_as_their_pixels_say(change, message, quality, warnings):
    expected = quality(unchanged)
    assert quality(change) == expected
    (told,) = [record.getMessage() for record in warnings.records]
    assert re.search(message, told)


def test_pixels_of_no_listed_segment_are_told(quality, warnings):
    quality(lambda content: [a["segments_info"].pop() for a in content["annotations"]])
    (told,) = [record.getMessage() for record in warnings.records]
    assert "the first, image 1: 121 pixels are of no listed segment" in told


def first_segment(**fields: Any) -> Change:
    return lambda content: content["annotations"][1]["segments_info"][0].update(fields)


WHERE = r"annotations\[1\] \(image_id 2\): segments_info\[0\] \(id {}\): "
REFUSED: dict[str, tuple[Change, str]] = {
    "id 0": (first_segment(id=0), WHERE.format(0) + "'id' must be .* from 1 to 16777215, got 0"),
    "id too large": (first_segment(id=2**24), "'id' must be .* from 1 to 16777215, got 16777216"),
    "id null": (first_segment(id=None), "lacks 'id'"),
    "unknown class": (
        first_segment(category_id=4),
        WHERE.format(300) + "'category_id' must be .*4",
    ),
    "crowd of text": (first_segment(iscrowd="yes"), "'iscrowd' must be .* 0 to 1, got 'yes'"),
    "two classes": (
        lambda c: c["annotations"][0]["segments_info"].append({"id": 300, "category_id": 7}),
        r"segments_info\[3\] \(id 300\): segment 300 is listed twice",
    ),
    "two annotations": (
        lambda c: c["annotations"][1].update(image_id=1),
        "image 1 is annotated twice, and not alike",
    ),
    "no name": (lambda c: c["annotations"][1].pop("file_name"), "lacks 'file_name'"),
    "name of a list": (lambda c: c["annotations"][1].update(file_name=[]), "the name of a file"),
    "no list": (lambda c: c["annotations"][1].update(segments_info={}), "must be a list, got {}"),
    "thing of text": (
        lambda c: c["categories"][1].update(isthing="yes"),
        r"categories\[1\] \(id 7\): 'isthing' must be a whole number from 0 to 1, got 'yes'",
    ),
    "thing and stuff": (
        lambda c: c["categories"].append({"id": 3, "isthing": 0}),
        "category 3 is listed as a thing and as stuff",
    ),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_what_has_no_meaning_is_refused_before_the_first_image(change, message, quality):
    with pytest.raises(ValueError, match=message) as caught:
        quality(change)
    assert "panoptic.json is not a COCO file: " in str(caught.value)
    assert str(caught.value).startswith("data set 'new_dataset_")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("missing", ["panoptic_json", "thing_dataset_id_to_contiguous_id"])
def test_metadata_that_lack_a_field_are_named(missing, new_dataset):
    fields = {"panoptic_json": "a.json", "thing_dataset_id_to_contiguous_id": THINGS}
    del fields[missing]
    name = new_dataset([], stuff_dataset_id_to_contiguous_id=STUFF, **fields)
    with pytest.raises(ValueError, match=f"data set '{name}': its metadata lacks '{missing}'"):
        PanopticEvaluator(name).reset()


def test_semantic_metadata_without_classes_are_named(new_dataset):
    with pytest.raises(ValueError, match="its metadata lacks 'stuff_classes'"):
        SemanticEvaluator(new_dataset([])).reset()


# --- the PNGs ---------------------------------------------------------------------------------

DAMAGED: dict[str, Callable[[Path], Any]] = {
    "no image": lambda path: path.write_text("no image"),
    "empty": lambda path: path.write_bytes(b""),
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:44]),
    "of 1 bit": lambda path: Image.new("1", SIZE[::-1]).save(path),
    "grey with alpha": lambda path: Image.new("LA", SIZE[::-1]).save(path),
    "turned": lambda path: Image.new("RGB", SIZE).save(path),
    "small": lambda path: Image.new("RGB", (5, 4)).save(path),
}
NO_COLOURS: dict[str, Callable[[Path], Any]] = {
    "missing": lambda path: path.unlink(),
    "of palette": lambda path: Image.new("P", SIZE[::-1]).save(path),
    "grey": lambda path: Image.new("L", SIZE[::-1]).save(path),
    "of 16 bits": lambda path: Image.new("I;16", SIZE[::-1]).save(path),
}


@pytest.mark.parametrize(
    "damage", [*DAMAGED.values(), *NO_COLOURS.values()], ids=[*DAMAGED, *NO_COLOURS]
)
def test_panoptic_pngs_that_are_none_are_named(damage, quality, tmp_path):
    damage(tmp_path / "2.png")
    with pytest.raises((ValueError, FileNotFoundError), match=r"2\.png") as caught:
        quality(unchanged)
    assert "\n" not in str(caught.value)


def labelled(path: Path, new_dataset: Callable[..., str]) -> Callable[[], Any]:
    """Evaluates an image whose labels are in a file."""
    item = {"file_name": "a.jpg", "sem_seg_file_name": str(path)}
    evaluator = SemanticEvaluator(new_dataset([item], stuff_classes=["a", "b"]))
    evaluator.reset()
    return lambda: evaluator.process([item], [{"sem_seg": torch.zeros(2, *SIZE)}])


@pytest.mark.parametrize("damage", DAMAGED.values(), ids=DAMAGED)
def test_label_pngs_that_are_none_are_named(damage, tmp_path, new_dataset):
    Image.new("L", SIZE[::-1]).save(tmp_path / "labels.png")
    damage(tmp_path / "labels.png")
    with pytest.raises(ValueError, match=r"labels\.png") as caught:
        labelled(tmp_path / "labels.png", new_dataset)()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("mode", ["L", "P", "I;16"])
def test_whole_numbers_of_every_depth_are_labels(mode, tmp_path, new_dataset):
    Image.new(mode, SIZE[::-1]).save(tmp_path / "labels.png")
    labelled(tmp_path / "labels.png", new_dataset)()


def test_negative_labels_are_refused(tmp_path, new_dataset):
    path = tmp_path / "labels.tiff"
    Image.fromarray(np.full(SIZE, -1, np.int32)).save(path)
    with pytest.raises(ValueError, match="labels of a.jpg must be below 2 or 255 .*, got -1"):
        labelled(path, new_dataset)()
