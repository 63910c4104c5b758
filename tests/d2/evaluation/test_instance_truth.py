"""Average precision against pycocotools on valid files, and what numbers in a file may change."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from expedite_d2.d2 import Boxes, Instances
from expedite_d2.d2.data.dataset_files import tell_once
from expedite_d2.d2.evaluation.instance import InstanceEvaluator, encode_masks

SIZE = (240, 320)
CATEGORIES = {3: 0, 7: 1, 9: 2}
Change = Callable[[dict[str, Any]], None]


def star(rng: np.random.Generator, height: float, width: float) -> list[float]:
    """A polygon about a point, with two decimals as in COCO, and a little outside now and then."""
    angles = np.sort(rng.uniform(0, 2 * math.pi, rng.integers(3, 12)))
    x, y = rng.uniform(0, SIZE[1]), rng.uniform(0, SIZE[0])
    radii = rng.uniform(0.2, 1, len(angles))
    points = np.stack([x + width * radii * np.cos(angles), y + height * radii * np.sin(angles)], 1)
    low, high = np.array([-1, -1]), np.array([SIZE[1] + 1, SIZE[0] + 1])
    return np.clip(points, low, high).round(2).ravel().tolist()


def polygon_area(polygon: list[float]) -> float:
    x, y = np.reshape(polygon, (-1, 2)).T
    return abs(float(x @ np.roll(y, 1) - y @ np.roll(x, 1))) / 2


def valid_file() -> dict[str, Any]:
    return copy.deepcopy(made_file())


@functools.cache
def made_file(images: int = 4) -> dict[str, Any]:
    """COCO's conventions: area and box of an object are its polygons', of a crowd its mask's."""
    rng = np.random.default_rng(5)
    annotations: list[dict[str, Any]] = []
    for image in range(images):
        for number in range(9):
            extent = rng.choice([6, 40, 200]) * np.array([0.8, 1.0]) * rng.uniform(0.5, 1, 2)
            parts = [star(rng, *extent) for _ in range(rng.integers(1, 3))]
            points = np.concatenate([np.reshape(part, (-1, 2)) for part in parts])
            box = [*points.min(0), *(points.max(0) - points.min(0))]
            segmentation: Any = parts
            area = sum(map(polygon_area, parts))
            crowd = int(number == 8)
            if crowd:
                rle = coco_mask.merge(coco_mask.frPyObjects(parts, *SIZE))
                runs = np.flatnonzero(
                    np.diff(coco_mask.decode(rle).ravel(order="F"), prepend=0, append=2)
                )
                counts = np.diff(runs, prepend=0).tolist()
                segmentation = {"size": list(SIZE), "counts": counts}
                area, box = int(coco_mask.area(rle)), coco_mask.toBbox(rle)
            annotations.append(
                {
                    "id": 1000 + len(annotations),
                    "image_id": 50 - image,
                    "category_id": int(rng.choice(list(CATEGORIES))),
                    "iscrowd": crowd,
                    "area": area,
                    "bbox": [float(side) for side in box],
                    "segmentation": segmentation,
                }
            )
    records = [{"id": 50 - i, "height": SIZE[0], "width": SIZE[1]} for i in range(images)]
    categories = [{"id": number, "name": str(number)} for number in CATEGORIES]
    return {"images": records, "annotations": annotations, "categories": categories}


@functools.cache
def predictions(exact: bool = False) -> dict[int, Instances]:
    """What a fair detector finds: masks a little off, some wrong classes, equal scores."""
    rng = np.random.default_rng(6)
    content = valid_file()
    found = {}
    for image in content["images"]:
        masks, classes = [], []
        for one in content["annotations"]:
            if one["image_id"] != image["id"] or (exact and one["iscrowd"]):
                continue
            rle = coco_mask.frPyObjects(one["segmentation"], *SIZE)
            mask = coco_mask.decode(coco_mask.merge(rle) if isinstance(rle, list) else rle)
            wrong = not exact and rng.random() < 0.2
            masks.append(mask if exact else np.roll(mask, tuple(rng.integers(-2, 3, 2)), (0, 1)))
            classes.append(int(rng.integers(3)) if wrong else CATEGORIES[one["category_id"]])
        instances = Instances(SIZE)
        instances.pred_masks = torch.from_numpy(np.stack(masks))
        instances.pred_classes = torch.tensor(classes)
        instances.scores = torch.from_numpy(rng.random(len(masks)).round(1).astype(np.float32))
        boxes = [coco_mask.toBbox(coco_mask.encode(np.asfortranarray(mask))) for mask in masks]
        corners = np.array([[x, y, x + w, y + h] for x, y, w, h in boxes], np.float32)
        instances.pred_boxes = Boxes(torch.from_numpy(corners))
        found[image["id"]] = instances
    return found


def pycocotools_stats(path: Path, found: dict[int, Instances], kind: str) -> list[float]:
    """AP, AP50, AP75, APs, APm, APl as pycocotools itself computes them from the file."""
    results: list[dict[str, Any]] = []
    ids = list(CATEGORIES)
    for image, instances in found.items():
        for number, mask in enumerate(encode_masks(instances.pred_masks)):
            x0, y0, x1, y1 = instances.pred_boxes.tensor[number].tolist()
            results.append(
                {
                    "image_id": image,
                    "category_id": ids[instances.pred_classes[number]],
                    "score": float(instances.scores[number]),
                    "segmentation" if kind == "segm" else "bbox": mask
                    if kind == "segm"
                    else [x0, y0, x1 - x0, y1 - y0],
                }
            )
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(path))
        evaluation = COCOeval(truth, truth.loadRes(results), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [100 * value for value in evaluation.stats[:6]]


@pytest.fixture
def evaluated(tmp_path, new_dataset):
    """Evaluates predictions of the valid file against the file that `change` made of it."""

    def call(change: Change, found: dict[int, Instances]) -> dict[str, dict[str, Any]]:
        content = valid_file()
        change(content)
        path = tmp_path / "instances.json"
        path.write_text(json.dumps(content))
        name = new_dataset([], json_file=str(path), thing_dataset_id_to_contiguous_id=CATEGORIES)
        evaluator = InstanceEvaluator(name, 100)
        evaluator.reset()
        for image, instances in found.items():
            evaluator.process([{"image_id": image}], [{"instances": instances}])
        return evaluator.evaluate()

    return call


@pytest.fixture
def warnings(caplog):
    tell_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        yield caplog


def unchanged(content: dict[str, Any]) -> None:
    pass


def test_average_precision_equals_pycocotools_to_the_last_digit(tmp_path, evaluated, warnings):
    found = predictions()
    results = evaluated(unchanged, found)
    for kind in ("segm", "bbox"):
        expected = pycocotools_stats(tmp_path / "instances.json", found, kind)
        assert min(expected) > 0 and max(expected) < 100
        assert list(results[kind].values()) == expected
    assert not warnings.records, "every area and box of a valid file is explained by its mask"


def each(**fields: Any) -> Change:
    """Gives a field of every annotation a value, or what a function makes of the annotation."""

    def change(content: dict[str, Any]) -> None:
        for number, one in enumerate(content["annotations"]):
            for field, value in fields.items():
                one[field] = value(number, one) if callable(value) else value

    return change


def without(field: str) -> Change:
    def change(content: dict[str, Any]) -> None:
        for one in content["annotations"]:
            one.pop(field, None)

    return change


def renamed_images(rename: Callable[[int], Any], annotations_alike: bool = True) -> Change:
    def change(content: dict[str, Any]) -> None:
        for image in content["images"]:
            image["id"] = rename(image["id"])
        for one in content["annotations"]:
            one["image_id"] = rename(one["image_id"]) if annotations_alike else one["image_id"]

    return change


def twice(content: dict[str, Any]) -> None:
    content["images"] += copy.deepcopy(content["images"])


SAME = {
    "ids from 0": each(id=lambda number, one: number),
    "ids all alike": each(id=1),
    "ids of text": each(id=lambda number, one: f"a{number}"),
    "ids of null": each(id=None),
    "no ids": without("id"),
    "no iscrowd where it is 0": lambda c: [
        a.pop("iscrowd") for a in c["annotations"] if not a["iscrowd"]
    ],
    "iscrowd of text": each(iscrowd=lambda number, one: str(one["iscrowd"])),
    "iscrowd of booleans": each(iscrowd=lambda number, one: bool(one["iscrowd"])),
    "iscrowd of floats": each(iscrowd=lambda number, one: float(one["iscrowd"])),
    "iscrowd null": each(iscrowd=lambda number, one: one["iscrowd"] or None),
    "categories of text": each(category_id=lambda number, one: str(one["category_id"])),
    "categories of floats": each(category_id=lambda number, one: float(one["category_id"])),
    "no list of categories": lambda content: content.pop("categories"),
    "list of categories null": lambda content: content.update(categories=None),
    "images of text": renamed_images(str),
    "images of text in one list": renamed_images(str, annotations_alike=False),
    "images of floats": renamed_images(float),
    "images listed twice": twice,
    "sizes of text": lambda content: [i.update(height=str(SIZE[0])) for i in content["images"]],
}


@pytest.mark.parametrize("change", SAME.values(), ids=SAME)
def test_what_can_only_mean_one_thing_changes_no_digit(change, evaluated, warnings):
    found = predictions()
    assert evaluated(change, found) == evaluated(unchanged, found)
    assert not warnings.records


NUMBERS = {
    "zero": 0,
    "negative": -5.0,
    "huge": 1e11,
    "beyond all floats": 10**400,
    "not a number": math.nan,
    "infinite": math.inf,
    "text": "many",
    "a list": [1, 2],
    "true": True,
}


@pytest.mark.parametrize("value", NUMBERS.values(), ids=NUMBERS)
@pytest.mark.parametrize("field", ["area", "bbox"])
def test_area_and_box_come_from_the_mask_where_it_does_not_explain_the_files(
    field: str, value: Any, evaluated, warnings
):
    found = predictions(exact=True)
    results = evaluated(each(**{field: value if field == "area" else [value] * 4}), found)
    assert results == evaluated(without(field), found)
    assert all(result == pytest.approx(100) for result in results["segm"].values())
    told = [record.getMessage() for record in warnings.records]
    assert len(told) == 1
    assert "instances.json gives areas or boxes to " in told[0]
    assert "the first, image " in told[0] and f": {field} " in told[0]


def test_areas_and_boxes_that_are_missing_come_from_the_mask(evaluated, warnings):
    found = predictions(exact=True)
    expected = evaluated(unchanged, found)["segm"]
    for change in (without("area"), without("bbox"), each(area=None, bbox=None)):
        assert evaluated(change, found)["segm"] == pytest.approx(expected)
    assert not warnings.records


def test_boxes_by_their_corners_come_from_the_mask(evaluated, warnings):
    def corners(number: int, one: dict[str, Any]) -> list[float]:
        x, y, width, height = one["bbox"]
        return [x, y, x + width, y + height]

    found = predictions(exact=True)
    assert evaluated(each(bbox=corners), found) == evaluated(without("bbox"), found)
    assert len(warnings.records) == 1


REFUSED: dict[str, tuple[Change, str]] = {
    "unknown category": (each(category_id=4), r"annotations\[0\] \(id 1000\): 'category_id' must"),
    "no category": (without("category_id"), r"annotations\[0\] \(id 1000\): lacks 'category_id'"),
    "crowd of text": (each(iscrowd="no"), "'iscrowd' must be a whole number from 0 to 1, got 'no'"),
    "crowd of 2": (each(iscrowd=2), "'iscrowd' must be a whole number from 0 to 1, got 2"),
    "image of a list": (each(image_id=[1]), r"'image_id' must be a whole number or a name, got \["),
    "no polygon": (each(segmentation=[]), r"annotations\[0\] \(id 1000\): a segmentation must be"),
    "two points": (each(segmentation=[[1, 2, 3, 4]]), "no polygon of three or more points"),
    "nothing": (
        each(segmentation=None),
        "must be polygons or run lengths, got None",
    ),
    "far away": (each(segmentation=[[1e9, 1, 2, 3, 4, 5]]), "farther from the image than it is"),
    "not a number": (each(segmentation=[[math.nan, 1, 2, 3, 4, 5]]), "not finite"),
    "another size": (
        each(segmentation={"size": [5, 5], "counts": [25]}),
        "must have its image's size 240x320, got 5x5",
    ),
    "no size": (lambda c: c["images"][2].pop("width"), r"images\[2\] \(id 48\): lacks 'width'"),
    "size of text": (
        lambda c: c["images"][2].update(height="tall"),
        "'height' must be a whole number of at least 1, got 'tall'",
    ),
    "two sizes of one image": (
        lambda c: c["images"].append({"id": 48, "height": 5, "width": 5}),
        r"images\[4\] \(id 48\): image 48 is listed twice, and not alike",
    ),
    "no images": (lambda c: c.pop("images"), "it lacks 'images'"),
    "no record": (lambda c: c["annotations"].insert(1, 5), r"annotations\[1\]: must be an object"),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_what_has_no_meaning_is_refused_before_the_first_image(change, message, evaluated):
    with pytest.raises(ValueError, match=message) as caught:
        evaluated(change, {})
    assert str(caught.value).startswith("data set 'new_dataset_")
    assert "instances.json is not a COCO file: " in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_picture_of_another_size_than_its_annotation_is_refused(evaluated):
    found = predictions()

    def other(content: dict[str, Any]) -> None:
        for image in content["images"]:
            image["height"], image["width"] = SIZE[1], SIZE[0]
        content["annotations"] = [a for a in content["annotations"] if not a["iscrowd"]]

    with pytest.raises(ValueError, match="image 50 .*instances.json, 320x240, got 240x320"):
        evaluated(other, found)


# --- data sets without an annotation file -----------------------------------------------------


def entry(**fields: Any) -> dict[str, Any]:
    mask = {"size": [4, 5], "counts": [2, 6, 12]}
    annotation = {"category_id": 1, "iscrowd": 0, "segmentation": mask}
    return {"image_id": "a", "height": 4, "width": 5, "annotations": [annotation], **fields}


def test_entries_are_evaluated_where_there_is_no_file(new_dataset):
    things = {"thing_classes": ["a", "b"]}
    for metadata in (things, {**things, "thing_dataset_id_to_contiguous_id": {4: 0, 9: 1}}):
        evaluator = InstanceEvaluator(new_dataset([entry()], **metadata), 100)
        evaluator.reset()
        instances = Instances((4, 5))
        rle = {"size": [4, 5], "counts": [2, 6, 12]}
        mask = coco_mask.decode(coco_mask.frPyObjects(rle, 4, 5))
        instances.pred_masks = torch.from_numpy(mask)[None]
        instances.pred_classes, instances.scores = torch.tensor([1]), torch.tensor([0.5])
        evaluator.process([{"image_id": "a"}], [{"instances": instances}])
        assert evaluator.evaluate()["segm"]["AP"] == pytest.approx(100)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"height": None}, "image a: lacks 'height'"),
        ({"annotations": None}, "image a: it lacks 'annotations'"),
        ({"annotations": [{}]}, r"image a: annotations\[0\]: lacks 'category_id'"),
        ({"annotations": [{"category_id": 7}]}, "'category_id' must be listed .*got 7"),
        ({"annotations": [{"category_id": 1}]}, "a segmentation must be polygons or run lengths"),
        ({"height": 5}, "a segmentation must have its image's size 5x5, got 4x5"),
    ],
)
def test_entries_that_cannot_be_evaluated_are_refused(wrong, message, new_dataset):
    name = new_dataset([entry(**wrong)], thing_dataset_id_to_contiguous_id={4: 0, 9: 1})
    with pytest.raises(ValueError, match=message):
        InstanceEvaluator(name, 100).reset()


def test_metadata_that_lack_the_classes_are_named(new_dataset):
    with pytest.raises(ValueError, match="its metadata lacks 'thing_classes'"):
        InstanceEvaluator(new_dataset([entry()]), 100).reset()
